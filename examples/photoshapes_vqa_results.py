#!/usr/bin/env python
"""Table of LLaVA on PhotoShapes' questions, scored by lmms-eval: dense, smaller images, random, resizing, APT.

examples:
  python examples/photoshapes_vqa_results.py data/photoshapes_big work_dirs/llava_dense work_dirs/llava_apt
  python examples/photoshapes_vqa_results.py data/photoshapes_big llava_apt/checkpoints/small_photoshapes \\
      work_dirs/llava_apt --limit 200 --rounds 3

Writes one JSON file: every figure, hardware, versions, command. Speeds come from the same run: before the scoring, all
variants answer the same batches, interleaved, several rounds over, image processing included. Started again, it repeats
nothing that is finished and whose inputs (checkpoints, data, settings, code) are still the same.
"""

import argparse
import contextlib
import functools
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor

import llava_apt
from tools.cli import parser_of
from apt_backbones.distill import save_tensors
from apt_backbones.resample import resample_positions
from examples.report import AFTER, BEFORE, DENSE, SMALLER_DENSE, write_report
from llava_apt import LlavaAptProcessor
from llava_apt.data import read_records
from llava_apt.lmms_eval_plugin import LlavaAptSimple, parse_thresholds
from llava_apt.new_layers import FILE_NAME
from llava_apt.prompt import question_prompt
from tools.machine import hardware
from tools.steps import Steps, fingerprint, run

TASK = "photoshapes_vqa"
TYPES = ("yes/no", "shape", "colour", "count", "position")
KINDS = ("accuracy", *TYPES)  # columns of the table
MAJORITY = "most frequent answer"
SETTINGS = {"max_new_tokens": 4}
CODE = [*(Path(__file__).parents[1] / package for package in ("apt_backbones", "llava_apt")), Path(__file__)]


@contextlib.contextmanager
def task_manager(data: Path):
    """lmms-eval's task with the data's absolute path."""
    source = Path(llava_apt.__file__).parent / "eval_tasks"
    with tempfile.TemporaryDirectory() as folder:
        for path in source.iterdir():
            if path.is_file():
                text = path.read_text().replace("data/photoshapes/vqa", f"{data.resolve()}/vqa")
                (Path(folder) / path.name).write_text(text)
        os.environ["PHOTOSHAPES"] = str(data.resolve())
        yield TaskManager("WARNING", include_path=folder)


def score(model: LlavaAptSimple, manager: TaskManager, limit: int | None) -> dict[str, float]:
    """lmms-eval's accuracies in percent: in all and per type of question."""
    results = simple_evaluate(model, tasks=[TASK], task_manager=manager, limit=limit, log_samples=False)
    measured = results["results"][TASK]
    names = [KINDS[0], *(f"{KINDS[0]} {kind}" for kind in TYPES)]
    return {kind: 100 * measured[f"{name},none"] for kind, name in zip(KINDS, names)}


def majority(data: Path, limit: int | None) -> dict[str, float]:
    """Accuracy in percent of giving the answer that this very question has most often in training; for questions
    that never occur there, the most frequent answer of their type."""
    counts = defaultdict(Counter)
    for record in read_records(data / "vqa_training.json"):
        question, answer = (message["value"] for message in record["conversations"])
        counts[question][answer] += 1
        counts[record["question_type"]][answer] += 1
    correct = defaultdict(list)
    for record in read_records(data / "vqa_validation.json")[:limit]:
        question, answer = (message["value"] for message in record["conversations"])
        known = counts[question] or counts[record["question_type"]]
        for kind in (KINDS[0], record["question_type"]):
            correct[kind].append(known.most_common(1)[0][0] == answer)
    return {kind: 100 * statistics.mean(correct[kind]) for kind in KINDS}


def tokens_per_image(model: LlavaAptSimple, pictures: list[Image.Image]) -> dict[str, float]:
    """Mean image tokens: all, and without the square padding's share (of a token's area that is padding)."""
    patch, total, content = model.processor.patch_size, [], []
    for picture in pictures:
        sides_HW = model.processor.image_processor(picture, return_tensors="pt")["patch_sides"][0]
        share_HW = (patch / sides_HW.clamp(min=patch)).square() * (sides_HW > 0)  # of a token, for each cell
        total.append(float(share_HW.sum()))
        content.append(float((share_HW * content_share(picture.size, *sides_HW.shape)).sum()))
    return {"tokens": statistics.mean(total), "content_tokens": statistics.mean(content)}


def content_share(size: tuple[int, int], height: int, width: int) -> Tensor:
    """Share of each cell's area (height, width) that lies in the image, after padding it to a square."""

    def along(length: int, cells: int) -> Tensor:
        margin = (max(size) - length) / 2 / max(size) * cells
        start = torch.arange(cells, dtype=torch.float64)
        return ((start + 1).clamp(max=cells - margin) - start.clamp(min=margin)).clamp(min=0)

    return along(size[1], height)[:, None] * along(size[0], width)


def speeds(models: dict[str, LlavaAptSimple], data: Path, samples: int, rounds: int) -> dict[str, list[float]]:
    """Samples per second of every variant in every round; variants take turns batch by batch."""
    batch_size = next(iter(models.values())).batch_size
    records = read_records(data / "vqa_validation.json")[:samples]
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    rates = {name: [] for name in models}
    for _ in range(rounds):
        seconds = dict.fromkeys(models, 0.0)
        for batch in batches:
            texts = [question_prompt(record["conversations"][0]["value"], 1) for record in batch]
            images = [[load(data, record["image"])] for record in batch]
            for name, model in models.items():
                started = time.perf_counter()
                model.answer(texts, images, SETTINGS)
                seconds[name] += time.perf_counter() - started
        for name in models:
            rates[name].append(len(records) / seconds[name])
    return rates


def load(data: Path, name: str) -> Image.Image:
    with Image.open(data / name) as image:
        return image.convert("RGB")


def smaller(dense: Path, side: int, folder: Path) -> Path:
    """The dense model for images of another side in pixels: its positions are resampled."""
    config, processor = LlavaConfig.from_pretrained(dense), LlavaProcessor.from_pretrained(dense)
    weights, vision = load_file(dense / "model.safetensors"), config.vision_config
    name = next(n for n in weights if "vision_tower." in n and n.endswith("position_embedding.weight"))
    before, after = (pixels // vision.patch_size for pixels in (vision.image_size, side))
    first, rest = weights[name][:1], weights[name][1:].unflatten(0, (before, before))
    weights[name] = torch.cat([first, resample_positions(rest, (after, after), antialias=True).flatten(0, 1)])
    vision.image_size, config.image_seq_length = side, after**2
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_tensors(folder / "model.safetensors", weights)
    return folder


def variants_of(args: argparse.Namespace) -> dict[str, dict]:
    """Arguments of ``LlavaAptSimple`` for every line of the table."""
    merged = dict(pretrained=str(args.dense), thresholds=args.thresholds)
    variants = {DENSE: dict(pretrained=str(args.dense), thresholds="off")}
    for side in args.smaller:
        folder = smaller(args.dense, side, args.work_dir / f"dense_{side}")
        variants[f"{SMALLER_DENSE}, {side} px"] = dict(pretrained=str(folder), thresholds="off")
    variants |= {
        "random": dict(merge="random", **merged),
        "resizing": dict(merge="resizing", **merged),
        BEFORE: merged,
        AFTER: dict(new_layers=str(args.new_layers), **merged),
    }
    if args.learned:
        scorer, thresholds = args.learned
        learned = dict(pretrained=str(args.dense), scorer=scorer, thresholds=thresholds)
        variants["resizing, learned scorer"] = dict(merge="resizing", **learned)
        if args.learned_layers:
            tuned = dict(new_layers=str(args.learned_layers), **learned)
            variants["APT, learned scorer, tuned without labels"] = tuned
    return variants


def measure(args: argparse.Namespace, command: str) -> dict:
    """Everything in the table; ``args`` as ``parser`` describes them.

    Raises:
        ValueError: a type of question does not occur among the first ``--limit`` ones.
    """
    torch.set_num_threads(args.threads)
    layers = args.new_layers
    versions = {name: version(name) for name in ("torch", "transformers", "lmms-eval")}
    common = {
        "data": fingerprint(args.data),
        "dense": fingerprint(args.dense),
        "new layers": fingerprint(layers / FILE_NAME if layers.is_dir() else layers),
        "code": fingerprint(*CODE, pattern="*.py"),
        "versions": versions,
        "thresholds": args.thresholds,
        "learned": args.learned and [fingerprint(args.learned[0]), args.learned[1]],
        "learned layers": args.learned_layers and fingerprint(args.learned_layers),
        "batch size": args.batch_size,
        "machine": hardware(args.device),
    }
    steps = Steps(args.work_dir / "steps", common)
    records = read_records(args.data / "vqa_validation.json")[: args.limit]
    if missing := set(TYPES) - {record["question_type"] for record in records}:
        raise ValueError(f"the first {len(records)} questions lack {', '.join(sorted(missing))}; raise --limit")
    names = sorted({record["image"] for record in records})
    options = variants_of(args)

    def model(name: str) -> LlavaAptSimple:
        return LlavaAptSimple(**options[name], batch_size=args.batch_size, device=args.device, dtype="float32")

    def timed() -> dict[str, list[float]]:
        return speeds({name: model(name) for name in options}, args.data, args.speed_samples, args.rounds)

    def scored(name: str) -> dict:
        lm = model(name)
        tokens = tokens_per_image(lm, [load(args.data, picture) for picture in names])
        with task_manager(args.data) as manager:
            return {**tokens, "accuracy": score(lm, manager, args.limit)}

    inputs = {"samples": args.speed_samples, "rounds": args.rounds}
    rates = steps.run("speed", f"speed: {args.rounds} interleaved rounds of all variants", inputs, timed)
    found = {
        name: steps.run(
            name.replace(" ", "_"),
            f"answers: {name}, {len(records)} questions",
            {"limit": args.limit},
            functools.partial(scored, name),
        )
        for name in options
    }
    dense = rates[DENSE]
    ratios = {name: statistics.median(a / b for a, b in zip(of, dense)) for name, of in rates.items()}
    rows = [
        {
            "title": name,
            "metrics": measured["accuracy"],
            "tokens": measured["tokens"],
            "content_kept": measured["content_tokens"] / found[DENSE]["content_tokens"],
            "per_second": statistics.median(dense) * ratios[name],
            "rounds_per_second": rates[name],
        }
        for name, measured in found.items()
    ]
    return {
        "task": "llava",
        "command": command,
        "hardware": common["machine"],
        "versions": versions,
        "measured_on": f"{len(records)} questions about {len(names)} of PhotoShapes' validation images",
        "scorer": LlavaAptProcessor.from_pretrained(args.dense).image_processor.scorer,
        "thresholds": parse_thresholds(args.thresholds),
        "learned_thresholds": parse_thresholds(args.learned[1]) if args.learned else None,
        "minutes_dense": None,
        "minutes_short_finetune": None,
        "rows": [*rows, {"title": MAJORITY, "metrics": majority(args.data, args.limit)}],
    }


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("data", type=Path, help="folder that examples/make_photoshapes.py made")
    add("dense", type=Path, help="checkpoint that examples/train_photoshapes_vqa.py made")
    add("new_layers", type=Path, help="folder or file that llava_apt.finetune made from it")
    add("--thresholds", default="28=4.5", metavar="PIXELS=BITS", help="as fine-tuned with (%(default)s)")
    add("--learned", nargs=2, metavar=("SCORER", "PIXELS=NATS"), help="a learned scorer's file, and its thresholds")
    add("--learned-layers", type=Path, metavar="FILE", help="new layers that were trained with it without labels")
    add("--smaller", nargs="*", type=int, default=[], metavar="PIXELS", help="sides of smaller images, dense")
    add("--output", type=Path, default=Path("docs/results/photoshapes_vqa.json"), help="(%(default)s)")
    add("--work-dir", type=Path, default=Path("work_dirs/vqa"), help="for what is finished (%(default)s)")
    add("--batch-size", type=int, default=16, help="(%(default)s)")
    add("--limit", type=int, help="only so many questions")
    add("--speed-samples", type=int, default=128, help="questions a round (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser


def main() -> None:
    args = parser().parse_args()
    report = measure(args, shlex.join(["examples/photoshapes_vqa_results.py", *sys.argv[1:]]))
    print(write_report(args.output, report))


if __name__ == "__main__":
    run(main)
