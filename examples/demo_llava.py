"""The demo's small LLaVA: thresholds for a token budget, short fine-tune, results, and questions with their answers."""

import io
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path

import torch
from datasets import disable_progress_bars
from PIL import Image
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from apt_backbones import PatchLayout
from apt_backbones.calibrate import calibrate_thresholds, kept_shares, score_maps_of
from apt_backbones.files import write_atomically
from apt_backbones.images import read_rgb, to_tensor
from apt_backbones.selection import undo_normalization
from examples import demo_pictures
from examples import photoshapes_vqa_results as vqa
from examples.demo_page import data_uri
from examples.demo_pictures import patch_legend, patches, spread
from examples.report import AFTER, DENSE
from llava_apt import LlavaAptProcessor
from llava_apt.data import read_records
from llava_apt.finetune import finetune, parser
from llava_apt.lmms_eval_plugin import LlavaAptSimple
from llava_apt.new_layers import FILE_NAME
from llava_apt.prompt import question_prompt
from llava_apt.run_folder import last_checkpoint
from tools import drawing
from tools.mm_config import advice_for
from tools.steps import Steps, announced, console, digest, fingerprint, track

# About 100 steps. New layers of so small a model take a larger learning rate than LLaVA's, and more steps are better.
FRACTION, BATCH, LEARNING_RATE = 0.05, 32, 3e-3
QUESTIONS = 4  # shown about an image, at most
SPEED = (
    "Questions answered a second, image processing included; all methods take turns batch by batch, in several rounds, "
    "and the table has medians."
)
NEXT = """\
python tools/calibrate.py --images data/images --sizes 28 --resize 336 --keep 0.7
python -m llava_apt.finetune --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json \\
    --image-folder data --output-dir llava-1.5-7b-apt --threshold 28=5.75
python -m lmms_eval --model llava_apt --model_args pretrained=llava-1.5-7b-apt,pad=True,dtype=bfloat16 \\
    --tasks gqa,textvqa_val,pope --force_simple --batch_size 16 --output_path results/llava-1.5-7b-apt"""

# What takes no time needs no bar, and that the new layers are new no warning.
disable_progress_bar()
disable_progress_bars()
set_verbosity_error()


class Adaptation:
    """A dense LLaVA and its adaptation to a token budget; each step done when needed, and kept.

    Args:
        dense: checkpoint, a folder in transformers' layout.
        data: folder that examples/make_photoshapes.py made.
        removed: share of content tokens to remove.
        folder: for everything that is kept between runs.
        limit: questions to answer.

    Raises:
        FileNotFoundError: there is no such data.
    """

    def __init__(self, dense: Path, data: Path, removed: float, folder: Path, limit: int):
        if not (data / "vqa_validation.json").is_file():
            raise FileNotFoundError(f"no data at {data}; {advice_for(data)}")
        self.dense, self.data, self.removed, self.folder, self.limit = dense, data, removed, folder, limit
        code = fingerprint(*vqa.CODE, pattern="*.py")
        self.steps = Steps(folder / "steps", {"data": fingerprint(data), "dense": fingerprint(dense), "code": code})
        self.processor = LlavaAptProcessor.from_pretrained(dense).image_processor

    @cached_property
    def calibration(self) -> dict:
        """``thresholds`` by size, and the ``shares`` of their tokens that the validation images then keep."""

        def calibrate() -> dict:
            patch_size, side = self.processor.patch_size, self.processor.crop_size["height"]
            sizes = tuple(self.processor.thresholds or {2 * patch_size: None})
            score_maps = []
            for path in track(sorted((self.data / "images" / "validation").iterdir()), "images"):
                image = read_rgb(path)
                image.thumbnail((side, side), Image.Resampling.BICUBIC)
                score_maps.append(score_maps_of(to_tensor(image), sizes, self.processor.scorer))
            thresholds = calibrate_thresholds(score_maps, patch_size, 1 - self.removed)
            return {"thresholds": thresholds, "shares": kept_shares(score_maps, thresholds, patch_size).tolist()}

        title = f"thresholds that keep {1 - self.removed:.0%} of the content tokens"
        return self.steps.run("thresholds", title, {"removed": self.removed}, calibrate)

    @property
    def thresholds(self) -> str:
        """As the commands take them."""
        return ";".join(f"{size}={value:g}" for size, value in self.calibration["thresholds"].items())

    @cached_property
    def tuned(self) -> Path:
        """Folder of the short fine-tune, which is begun, continued, or found to be finished."""
        options = ["--model", self.dense, "--data", self.data / "vqa_training.json", "--image-folder", self.data]
        options += ["--fraction", FRACTION, "--learning-rate", LEARNING_RATE]
        options += ["--total-batch-size", BATCH, "--device-batch-size", BATCH, "--save_steps", 5]
        options += [part for each in self.thresholds.split(";") for part in ("--threshold", each)]
        options += ["--gradient_checkpointing", "false", "--dataloader_num_workers", 0, "--log_level", "error"]
        options += [] if torch.cuda.is_available() else ["--use_cpu"]
        folder = self.folder / f"finetune-{digest([self.steps.common, options])}"
        title = "short fine-tune by llava_apt.finetune"
        if (folder / FILE_NAME).is_file():  # written last
            console.print(f"[green]kept[/]  {title}", highlight=False)
            return folder
        continued = last_checkpoint(folder) is not None
        arguments = parser().parse_known_args([str(part) for part in [*options, "--output-dir", folder, "--resume"]])
        # The trainer's progress bar goes to stderr; its lines, which the page's curve shows, to stdout.
        trainers_lines = redirect_stdout(io.StringIO())
        with announced(title + ", continued" * continued), self._stopwatch(folder), trainers_lines:
            finetune(*arguments)
        return folder

    @contextmanager
    def _stopwatch(self, folder: Path) -> Iterator[None]:
        """Add what a part of the short fine-tune took, even if it is interrupted, to what is noted in its folder."""
        before, started = self.minutes_tuned(folder), time.perf_counter()
        try:
            yield
        finally:
            write_atomically(folder / "minutes.json", json.dumps(before + (time.perf_counter() - started) / 60))

    def minutes_tuned(self, folder: Path) -> float:
        note = folder / "minutes.json"
        return json.loads(note.read_text()) if note.is_file() else 0.0

    def losses(self) -> list[tuple[int, float]]:
        """Steps of the short fine-tune and their losses, as the trainer logged them."""
        state = json.loads((last_checkpoint(self.tuned) / "trainer_state.json").read_text())
        return [(line["step"], line["loss"]) for line in state["log_history"] if "loss" in line]

    @property
    def arguments(self) -> Namespace:
        """Of the comparison."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = ["--thresholds", self.thresholds, "--work-dir", self.folder, "--limit", self.limit]
        options += ["--device", device, "--batch-size", 32, "--rounds", 3, "--threads", torch.get_num_threads()]
        return vqa.parser().parse_args([str(part) for part in [self.data, self.dense, self.tuned, *options]])

    def report(self, command: str) -> dict:
        """The comparison, as examples/report.py describes it."""
        return {**vqa.measure(self.arguments, command), "minutes_short_finetune": self.minutes_tuned(self.tuned)}


def show(adaptation: Adaptation, count: int) -> dict:
    """``pictures`` of validation images with questions and answers, and ``legends``."""
    code = [Path(module.__file__) for module in (sys.modules[__name__], demo_pictures, drawing)]
    inputs = {"new layers": fingerprint(adaptation.tuned / FILE_NAME), "count": count, "drawn by": fingerprint(*code)}
    return adaptation.steps.run("pictures", f"pictures of {count} images", inputs, lambda: draw(adaptation, count))


def draw(adaptation: Adaptation, count: int) -> dict:
    options = vqa.variants_of(adaptation.arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: LlavaAptSimple(**options[name], device=device, dtype="float32") for name in (DENSE, AFTER)}
    records = read_records(adaptation.data / "vqa_validation.json")
    names = sorted(path.name for path in (adaptation.data / "images" / "validation").iterdir())
    processor = models[AFTER].processor.image_processor
    pictures = []
    for index in spread(adaptation.calibration["shares"], count):
        name = f"images/validation/{names[index]}"
        image = read_rgb(adaptation.data / name)
        inputs = processor(image, return_tensors="pt")
        layout = PatchLayout.build(inputs["patch_sides"], processor.patch_size, tuple(processor.thresholds))
        mean, std = ([255 * x for x in values] for values in (processor.image_mean, processor.image_std))
        seen = undo_normalization(inputs["pixel_values"], mean, std)[0]
        seen = Image.fromarray(seen.clamp(0, 255).byte().permute(1, 2, 0).numpy())
        asked = [record for record in records if record["image"] == name][:QUESTIONS]
        label, picture = patches(seen, layout)
        pictures.append(
            {
                "caption": f"{names[index]}, padded to a square as LLaVA does it.",
                "panels": [{"label": label, "uri": data_uri(picture)}],
                "answers": [answers(record, image, models) for record in asked],
            }
        )
    return {"pictures": pictures, "legends": [patch_legend(tuple(layout.sizes))]}


def answers(record: dict, image: Image.Image, models: dict[str, LlavaAptSimple]) -> dict[str, str]:
    """A question, its true answer, and what both models say."""
    question, truth = (message["value"] for message in record["conversations"])
    said = [model.answer([question_prompt(question, 1)], [[image]], vqa.SETTINGS)[0][0] for model in models.values()]
    return {"question": question.removeprefix("<image>\n"), "truth": truth, "dense": said[0], "apt": said[1]}
