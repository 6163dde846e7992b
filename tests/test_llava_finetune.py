"""The short fine-tune, run as a user runs it, on a tiny random LLaVA: what changes, what is logged, what resumes."""

import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from apt_backbones.freeze import is_new
from llava_apt import LlavaAptForConditionalGeneration, LlavaAptProcessor, load_new_layers
from llava_apt.finetune import LlavaTrainer, make_trainable, parser, training_arguments

from .llava_tiny import CELLS, IMAGE, PROMPT, finetune_options, load_adapted, photo
from .llava_tiny import run_finetune as run
from .scripts import wait_for


def log_of(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def test_only_the_new_layers_change(task, finished):
    before = load_file(task / "model" / "model.safetensors")
    after = load_file(finished / "model.safetensors")
    new = {name for name in after if is_new(name)}
    assert len(new) == 4
    stock = LlavaAptForConditionalGeneration.from_pretrained(task / "model", thresholds={28: 2})
    tuned = LlavaAptForConditionalGeneration.from_pretrained(finished)
    assert len(before) + len(new) == len(after)
    for (name, old), (_, changed) in zip(stock.named_parameters(), tuned.named_parameters(), strict=True):
        assert torch.equal(old, changed) != is_new(name), name


def test_the_result_loads_as_a_whole_and_as_new_layers_only(task, finished):
    tuned = LlavaAptForConditionalGeneration.from_pretrained(finished).eval()
    assert tuned.config.text_config.use_cache and tuned.config.vision_config.thresholds == {28: 2.0}
    stock = LlavaAptForConditionalGeneration.from_pretrained(task / "model", thresholds={28: 2}).eval()
    load_new_layers(stock, finished)
    processor = LlavaAptProcessor.from_pretrained(finished)
    assert processor.image_processor.do_pad  # LLaVA's, not the checkpoint's crop
    inputs = processor(images=photo(), text="USER: <image> what ? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, tuned(**inputs).logits)


def test_tokens_per_image_are_logged(finished):
    """Every image of the task keeps as many, and some steps are of text alone."""
    counts = [entry["tokens_per_image"] for entry in log_of(finished / "checkpoint-6") if "loss" in entry]
    inputs = LlavaAptProcessor.from_pretrained(finished)(images=photo(size=(120, 90)), text=PROMPT)
    image_tokens = inputs["input_ids"][0].count(IMAGE)
    assert len(counts) == 6 and set(counts) == {0, image_tokens} and image_tokens < CELLS


def test_of_repeated_tokens_there_are_as_many_as_cells(task, tmp_path):
    for part in load_adapted(task / "model", image_tokens="repeated", thresholds={28: 2}):
        part.save_pretrained(tmp_path / "model")
    run(task, tmp_path / "run", "--model", tmp_path / "model", "--max_steps", "2")
    counts = [entry["tokens_per_image"] for entry in log_of(tmp_path / "run" / "checkpoint-2") if "loss" in entry]
    assert len(counts) == 2 and set(counts) <= {0, CELLS} and any(counts)


def test_samples_of_a_whole_step_are_sorted_together():
    args = SimpleNamespace(train_batch_size=2, world_size=3, gradient_accumulation_steps=4, seed=0)
    trainer = SimpleNamespace(args=args, train_dataset=SimpleNamespace(lengths=[5], has_image=[True]))
    assert LlavaTrainer._get_train_sampler(trainer).megabatch == 24


def test_bad_records_are_reported_and_abort_only_when_asked(task, finished, tmp_path):
    report = json.loads((finished / "bad_records.json").read_text())
    assert [(record["id"], record["reason"].split(" ")[0]) for record in report["left_out"]] == [
        ("lost", "missing"),
        ("mute", "roles"),
    ]
    with pytest.raises(ValueError, match="2 bad records, 0 are allowed; lost: missing image"):
        run(task, tmp_path, "--strict")


def begun(finished, folder):
    """As ``finished`` was when it had written its first checkpoint, and a part of the second."""
    shutil.copytree(finished / "checkpoint-3", folder / "checkpoint-3")
    shutil.copytree(finished / "checkpoint-6", folder / ".unfinished" / "checkpoint-6")
    (folder / ".unfinished" / "checkpoint-6" / "trainer_state.json").unlink()
    shutil.copy(finished / "finetune_run.json", folder)


def test_resuming_ends_where_the_uninterrupted_run_ends(task, finished, tmp_path):
    begun(finished, tmp_path)
    assert {name.split("adaptive_embed.")[1] for name in load_file(tmp_path / "checkpoint-3/model.safetensors")} == {
        name for name in load_file(finished / "apt_new_layers.safetensors")
    }
    run(task, tmp_path, "--save_steps", "3", "--resume")
    expected = [entry for entry in log_of(finished / "checkpoint-7") if "loss" in entry]
    resumed = [entry for entry in log_of(tmp_path / "checkpoint-7") if "loss" in entry]
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in expected]
    for name, tensor in load_file(finished / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], tensor), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in finished.iterdir() if path.name not in ("checkpoint-3", "checkpoint-6")
    )


def test_images_that_turn_out_to_be_unreadable_are_listed_even_if_the_run_is_interrupted(task, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in task.glob("*.png"):
        (images / path.name).write_bytes(b"" if path.name == "5.png" else path.read_bytes())
    more = ["--image-folder", images, "--save_steps", "1", "--save_total_limit", "9"]
    run(task, tmp_path / "whole", *more)
    seen = [json.loads((tmp_path / "whole" / f"checkpoint-{step}" / "unreadable.json").read_text()) for step in (4, 6)]
    assert seen[0] == seen[1] != []  # so that the resumed run has no reason to read it again
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    shutil.copytree(checkpoint, tmp_path / "part" / checkpoint.name)
    shutil.copy(tmp_path / "whole" / "finetune_run.json", tmp_path / "part")
    run(task, tmp_path / "part", *more, "--resume")
    reports = [json.loads((tmp_path / name / "bad_records.json").read_text()) for name in ("whole", "part")]
    assert reports[0] == reports[1]
    assert reports[0]["left_out"][-1] == {"id": "r5", "reason": "unreadable image"}


@pytest.mark.parametrize("train", ["projector", "lora"])
def test_what_else_can_train(task, tmp_path, train):
    run(task, tmp_path, "--train", train, "--max_steps", "3", "--seed", "7")
    set_seed(7)  # ConvDown starts at random
    before = LlavaAptForConditionalGeneration.from_pretrained(task / "model", thresholds={28: 2})
    after = LlavaAptForConditionalGeneration.from_pretrained(tmp_path)
    changed = set()
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if not torch.equal(old, new):
            changed.add(name.split("adaptive_embed.")[-1] if is_new(name) else name.split(".")[1])
    new = {f"{layer}.{part}" for layer in ("conv_down", "zero_mlp") for part in ("weight", "bias")}
    assert changed == new | {"multi_modal_projector" if train == "projector" else "language_model"}


def test_activation_checkpointing_reaches_the_frozen_layers(task):
    model = LlavaAptForConditionalGeneration.from_pretrained(task / "model", thresholds={28: 2})
    model = make_trainable(model, "new").train()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 5 and all(layer.training for layer in layers)
    assert not any(child.training for layer in layers for child in layer.children())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_copies_of_a_model_in_training_are_models_of_their_own(task):
    for train in ("new", "projector", "lora"):
        model = LlavaAptForConditionalGeneration.from_pretrained(task / "model", thresholds={28: 2})
        model = make_trainable(model, train).train()
        modes = [module.training for module in model.modules()]
        assert any(modes) and not all(modes)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.eval() is copied and not any(module.training for module in copied.modules())
            assert [module.training for module in model.modules()] == modes
            assert copied.train() is copied and [module.training for module in copied.modules()] == modes


def test_defaults_are_the_papers():
    args, extra = parser().parse_known_args(["--model", "m", "--data", "d", "--image-folder", "i", "--output-dir", "o"])
    training = training_arguments(args, ["--use_cpu"])
    assert args.fraction == 0.05 and training.learning_rate == 2e-6 and training.num_train_epochs == 1
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 0.03, 0.0)
    assert args.max_length == 2048 and training.gradient_checkpointing and not extra
    args.total_batch_size = 100
    with pytest.raises(ValueError, match="must be a multiple of --device-batch-size 16 x 1 processes"):
        training_arguments(args, [])


@pytest.mark.parametrize(
    "option, message",
    [
        ("--resume_from_checkpoint=o/checkpoint-3", "use --resume"),
        ("--save_only_model=true", "a run could not be resumed"),
        ("--label_smoothing_factor=0.1", "of which LLaVA is none"),
        ("--neftune_noise_alpha=5", "does not train"),
        ("--per_device_train_batch_size=1", "--total-batch-size and --device-batch-size alone"),
        ("--gradient_accumulation_steps=2", "--total-batch-size and --device-batch-size alone"),
    ],
)
def test_options_that_would_not_do_what_they_say_are_refused(option, message):
    folders = ["--model", "m", "--data", "d", "--image-folder", "i", "--output-dir", "o"]
    args, extra = parser().parse_known_args([*folders, option])
    with pytest.raises(ValueError, match=message):
        training_arguments(args, [*extra, "--use_cpu"])


def test_command_line_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "llava_apt.finetune", "--model", "m", "--image-folder", "i", "--output-dir", "o"]
    result = subprocess.run([*command, "--data", str(tmp_path / "no.json")], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("llava_apt.finetune: error:")


# ---------------------------------------------------------------------------------------- several processes


def launch(task, output, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "llava_apt.finetune", *finetune_options(task, output, "--ddp_backend", "gloo", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_equal_one_and_survive_being_killed(task, finished, tmp_path):
    """Text-only and image batches, 2 x 2 samples a step instead of 1 x 2 x 2 accumulated: the same losses; a run that
    is killed behind its first checkpoint and resumed ends with the same tensors."""
    whole = launch(task, tmp_path / "whole", "--save_steps", "3", "--save_total_limit", "5")
    assert whole.wait(timeout=600) == 0, whole.stderr.read()
    single = [entry["loss"] for entry in log_of(finished / "checkpoint-7") if "loss" in entry]
    double = [entry["loss"] for entry in log_of(tmp_path / "whole" / "checkpoint-7") if "loss" in entry]
    assert double == pytest.approx(single, rel=1e-3)

    killed = launch(task, tmp_path / "killed", "--save_steps", "1")
    wait_for(killed, lambda: list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    steps = [int(re.search(r"\d+$", path.name)[0]) for path in (tmp_path / "killed").glob("checkpoint-*")]
    assert max(steps) < 7
    resumed = launch(task, tmp_path / "killed", "--save_steps", "1", "--resume")
    assert resumed.wait(timeout=600) == 0, resumed.stderr.read()
    expected, result = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-6)
