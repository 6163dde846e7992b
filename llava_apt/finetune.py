"""Short fine-tune of LLaVA with adaptive patches (APT, section 3.4): ``python -m llava_apt.finetune --help``."""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from apt_backbones import freeze_host
from apt_backbones.files import write_atomically
from apt_backbones.freeze import is_new

from .data import BadRecord, LlavaCollator, LlavaDataset, ModalityGroupedSampler, read_records, subset
from .modeling import LlavaAptForConditionalGeneration
from .new_layers import save_new_layers
from .patches import resolve_thresholds
from .processing import LlavaAptProcessor
from .run_folder import (
    UNFINISHED,
    begin_run,
    content_of,
    damage_named,
    finish_checkpoint,
    finish_result,
    last_checkpoint,
    refuse_other_run,
    saving,
)

logger = logging.getLogger(__name__)

LESS = "use a smaller --learning-rate"
LORA = dict(r=128, lora_alpha=256, lora_dropout=0.05)  # LLaVA's own
REPORTED_IDS = 10
UNREADABLE_FILE = "unreadable.json"  # in a checkpoint: which conversations' images could not be read so far

# Settings of TrainingArguments, beside those of this program, that decide what comes out.
DECISIVE = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


# Options of TrainingArguments that would not do what they say.
UNUSABLE = {
    "resume_from_checkpoint": "use --resume, which goes on from the last checkpoint in --output-dir",
    "save_only_model": "a run could not be resumed from such checkpoints",
    "label_smoothing_factor": "Trainer smooths the labels of causal language models alone, of which LLaVA is none",
    "neftune_noise_alpha": "the embedding that it adds noise to does not train",
}


class LlavaTrainer(Trainer):
    """``Trainer``; what changes: LLaVA's modality-grouped order; the number of tokens per image in the log; an end to
    a run that diverges; and checkpoints that hold only what trains, get their names when they are whole, and are
    refused if they no longer are. (``Trainer`` writes whole models under the hub's names and resumes by the module's,
    so that it would resume LLaVA with its initial weights.)"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._image_tokens = torch.zeros(2, dtype=torch.float64)  # tokens, images since the last log

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset or self.train_dataset
        megabatch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ModalityGroupedSampler(dataset.lengths, dataset.has_image, megabatch, self.args.seed)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if (sides := inputs.get("patch_sides")) is not None:
            config = self.accelerator.unwrap_model(model).config
            tokens = sides.numel()
            if config.image_tokens == "merged":
                tokens = float((config.vision_config.patch_size / sides[sides > 0].double()).square().sum())
            self._image_tokens += torch.tensor([tokens, len(sides)])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {float(loss)} after step {self.state.global_step}; {LESS}")
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            counts = self.accelerator.reduce(self._image_tokens.float().to(self.args.device))
            logs["tokens_per_image"] = round(float(counts[0] / counts[1].clamp(min=1)), 1)
            self._image_tokens.zero_()
        super().log(logs, *args, **kwargs)

    def refuse_divergence(self) -> None:
        """Raise FloatingPointError if what was trained is no longer finite."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise FloatingPointError(f"{name} is not finite after step {self.state.global_step}; {LESS}")

    def unreadable(self) -> Tensor:
        """Which conversations' images could not be read by any process; all processes have to ask."""
        return self.accelerator.reduce(self.train_dataset.unreadable.float().to(self.args.device)) > 0

    def _get_output_dir(self, trial) -> str:
        return os.path.join(super()._get_output_dir(trial), UNFINISHED)

    def _save_checkpoint(self, model, trial):
        self.refuse_divergence()
        folder, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unreadable = self.unreadable().nonzero().flatten().tolist()
        with saving(name, folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has a file of its own
            if self.args.should_save:
                unfinished = folder / UNFINISHED / name
                write_atomically(unfinished / UNREADABLE_FILE, json.dumps(unreadable))
                finish_checkpoint(unfinished, folder / name)
                rotate_checkpoints(str(folder), self.args.save_total_limit)

    def _save(self, output_dir=None, state_dict=None):
        if not Path(output_dir or "").name.startswith(PREFIX_CHECKPOINT_DIR):
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        trained = {name: state_dict[name].contiguous() for name in self._trained()}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained, Path(output_dir) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with damage_named(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            unreadable = json.loads(Path(resume_from_checkpoint, UNREADABLE_FILE).read_text())
            self.train_dataset.unreadable[unreadable] = True

    def _load_optimizer_and_scheduler(self, checkpoint):
        with damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with damage_named(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result):
        lost = sorted(self._trained() & set(load_result.missing_keys)) + sorted(load_result.unexpected_keys)
        if lost:
            raise ValueError(f"the checkpoint is of a run with other trained layers, see {lost[0]}; use its --train")

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def make_trainable(model: LlavaAptForConditionalGeneration, train: str) -> nn.Module:
    """Freeze all but the new layers, and what ``train`` adds to them: "projector" or "lora" (the language model's
    linear layers, as LLaVA does it). Returns the model, wrapped by peft for "lora"."""
    freeze_host(model)
    if train == "projector":
        model.model.multi_modal_projector.requires_grad_(True)
    if train == "lora":
        from peft import LoraConfig, get_peft_model

        layers = r".*language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(target_modules=layers, task_type="CAUSAL_LM", **LORA))
        for name, parameter in model.named_parameters():
            if is_new(name):
                parameter.requires_grad_(True)
    return train_despite_eval_mode(model)


def train_despite_eval_mode(model: nn.Module) -> nn.Module:
    """Frozen layers are kept in eval mode. Mark as training what has to act nevertheless: LoRA's dropout, and the
    layers (nothing within them) that transformers' activation checkpointing recomputes in training mode only."""
    model.train = partial(_train, model, model.train)  # unlike a closure, copies and pickles follow the model
    return model


def _train(model: nn.Module, set_mode: Callable[[bool], nn.Module], mode: bool = True) -> nn.Module:
    set_mode(mode)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) or "lora_dropout" in name:
            module.training = mode
    return model


def report_bad(dataset: LlavaDataset, unreadable: Tensor, output_dir: Path) -> None:
    """Count and name the records that were left out or cut; all of them go to ``bad_records.json``."""
    bad = [*dataset.bad]
    bad += [BadRecord(dataset.conversations[i].id, "unreadable image") for i in unreadable.nonzero().flatten()]
    for record in bad[:REPORTED_IDS]:
        logger.warning("left out %s: %s", record.id, record.reason)
    if bad:
        logger.warning("left out %d records; all ids in %s", len(bad), output_dir / "bad_records.json")
    if dataset.cut:
        shown = ", ".join(dataset.cut[:REPORTED_IDS])
        logger.warning("cut %d over-long conversations at the end, among them %s", len(dataset.cut), shown)
    report = {"left_out": [vars(record) for record in bad], "cut": dataset.cut}
    write_atomically(output_dir / "bad_records.json", json.dumps(report, indent=1))


def threshold(text: str) -> tuple[int, float]:
    size, _, value = text.partition("=")
    return int(size), float(value)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_apt.finetune",
        description="Short fine-tune of LLaVA-1.5 with adaptive patches: only the new layers train, on 5 % of LLaVA's "
        "data. The defaults are the paper's.",
        epilog="Every option of transformers.TrainingArguments is accepted as well, for instance --fsdp, --deepspeed, "
        "--save_steps 50 or --use_cpu. Several GPUs: put `accelerate launch` or `torchrun --nproc-per-node N` in "
        "front. example: python -m llava_apt.finetune --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json "
        "--image-folder images --output-dir llava-1.5-7b-apt",
    )
    add = parser.add_argument
    add("--model", required=True, help="LLaVA-1.5 checkpoint in transformers' layout: hub name or folder")
    add("--data", required=True, metavar="JSON", help="LLaVA's conversations")
    add("--image-folder", required=True, metavar="DIR", help="folder that the data's image paths are relative to")
    add("--output-dir", required=True, metavar="DIR", help="for checkpoints and the result")
    add("--fraction", type=float, default=0.05, help="share of the data, images and text-only alike (%(default)s)")
    what = (
        "what trains beside the new layers: nothing (new), the projector, or LoRA in the language model (%(default)s)"
    )
    add("--train", choices=("new", "projector", "lora"), default="new", help=what)
    size = "merge patches of this side below this entropy in bits; repeat for more sizes (28=5.75)"
    add("--threshold", type=threshold, action="append", metavar="PIXELS=BITS", help=size)
    add("--learning-rate", type=float, default=2e-6, help="peak, cosine afterwards (%(default)s)")
    add("--total-batch-size", type=int, default=128, metavar="N", help="samples a step, over all GPUs (%(default)s)")
    add("--device-batch-size", type=int, default=16, metavar="N", help="samples at once on a GPU (%(default)s)")
    add("--max-length", type=int, default=2048, metavar="TOKENS", help="longer conversations are cut (%(default)s)")
    add("--crop", action="store_true", help="crop images as the checkpoint says instead of LLaVA's square padding")
    again = parser.add_mutually_exclusive_group()
    resume = "continue from the last checkpoint in --output-dir, with the settings that the run was begun with"
    again.add_argument("--resume", action="store_true", help=resume)
    again.add_argument("--overwrite", action="store_true", help="delete the run that --output-dir holds")
    bad = parser.add_mutually_exclusive_group()
    allowed = "stop at more than N bad records instead of leaving all out; each process counts its unreadable images"
    bad.add_argument("--max-bad", type=int, metavar="N", help=allowed)
    bad.add_argument("--strict", dest="max_bad", action="store_const", const=0, help="stop at the first bad record")
    outside = "read images outside of --image-folder, too, which paths and links in the data may lead to"
    add("--allow-outside-images", action="store_true", help=outside)
    return parser


def training_arguments(args: argparse.Namespace, extra: list[str]) -> TrainingArguments:
    """LLaVA's recipe, METHOD of the paper's short fine-tune; ``extra`` are TrainingArguments from the command line."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accumulation, rest = divmod(args.total_batch_size, args.device_batch_size * world_size)
    if rest or not accumulation:
        raise ValueError(
            f"--total-batch-size {args.total_batch_size} must be a multiple of --device-batch-size "
            f"{args.device_batch_size} x {world_size} processes"
        )
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    arguments = HfArgumentParser(TrainingArguments)
    arguments.set_defaults(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.device_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        bf16=half,
        gradient_checkpointing=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_num_workers=4,
        logging_steps=1,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
    )
    training = arguments.parse_args_into_dataclasses(extra)[0]
    for name, reason in UNUSABLE.items():
        if getattr(training, name):
            raise ValueError(f"--{name}: {reason}")
    if (
        training.per_device_train_batch_size * world_size * training.gradient_accumulation_steps
        != args.total_batch_size
    ):
        raise ValueError("the batch is set by --total-batch-size and --device-batch-size alone")
    return training


def settings_of(
    args: argparse.Namespace, training: TrainingArguments, processor: LlavaAptProcessor, dataset: LlavaDataset
) -> dict[str, object]:
    """What decides a run's result, by the names of the options; neither folders nor the number of processes do."""
    images = processor.image_processor
    usable = hashlib.sha256(repr([conversation.id for conversation in dataset.conversations]).encode())
    return {
        "--model": content_of(args.model),
        "--data": content_of(args.data),
        "--fraction": args.fraction,
        "usable records": f"{len(dataset)} ({usable.hexdigest()[:16]})",
        "--train": args.train,
        "--threshold": {
            str(size): value for size, value in resolve_thresholds(images.thresholds, images.patch_size).items()
        },
        "--total-batch-size": training.train_batch_size * training.world_size * training.gradient_accumulation_steps,
        "--max-length": args.max_length,
        "--crop": args.crop,
        **{f"--{name.replace('_', '-')}": getattr(training, name) for name in DECISIVE},
    }


def finetune(args: argparse.Namespace, extra: list[str]) -> None:
    """Train, and write the adapted model, its processor and the new layers alone to ``args.output_dir``."""
    training = training_arguments(args, extra)
    output_dir = Path(args.output_dir)
    if output_dir.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output-dir {output_dir} is the folder of --model; choose another")
    options = {"thresholds": dict(args.threshold)} if args.threshold else {}
    crop = {} if args.crop else {"do_pad": True}
    records = subset(read_records(args.data), args.fraction)
    processor = LlavaAptProcessor.from_pretrained(args.model, **options, **crop)
    dataset = LlavaDataset(
        records, args.image_folder, processor, args.max_length, args.max_bad, args.allow_outside_images
    )
    is_main = training.process_index == 0
    with training.main_process_first(local=False):
        if is_main:
            settings = settings_of(args, training, processor, dataset)
            refuse_other_run(output_dir, settings, args.resume, args.overwrite)
            report_bad(dataset, dataset.unreadable, output_dir)
            if dataset.bad:
                dataset.refuse_too_many_bad(dataset.bad[0])
            begin_run(output_dir, settings, args.resume)
        last = last_checkpoint(output_dir)
    if args.resume and last is None:
        logger.warning("nothing to resume in %s; starting at the beginning", output_dir)
    set_seed(training.seed)  # ConvDown starts at random
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    model = LlavaAptForConditionalGeneration.from_pretrained(args.model, dtype=dtype, **options)
    model = make_trainable(model, args.train)
    for parameter in model.parameters():
        if parameter.requires_grad:  # so small a learning rate would be lost in bfloat16's rounding
            parameter.data = parameter.data.float()
    trainer = LlavaTrainer(
        model, training, LlavaCollator(processor, args.max_length), dataset, processing_class=processor
    )
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    except Exception:
        if is_main:
            with suppress(OSError):  # the disk may be full
                report_bad(dataset, dataset.unreadable, output_dir)
        raise
    trainer.refuse_divergence()
    unreadable = trainer.unreadable()
    if is_main:
        report_bad(dataset, unreadable, output_dir)
    if args.train == "lora":
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    with saving("the result", output_dir):
        trainer.save_model(str(output_dir / UNFINISHED))
        trainer.accelerator.wait_for_everyone()
        if is_main:
            save_new_layers(trainer.accelerator.unwrap_model(trainer.model), output_dir / UNFINISHED)
            finish_result(output_dir / UNFINISHED, output_dir)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args, extra = parser().parse_known_args()
    try:
        finetune(args, extra)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if "Original Traceback" in message:  # a loader's worker process hands on all that it knows
            message = message.strip().splitlines()[-1]
        sys.exit(f"llava_apt.finetune: error: {' '.join(message.split())}")


if __name__ == "__main__":
    main()
