#!/usr/bin/env python
"""Table of LLaVA on PhotoShapes' questions, scored by lmms-eval: dense, random, resizing, APT before and after tuning.

Writes NAME.json (every figure, hardware, versions, command) and NAME.md. Speeds come from the same run: before the
scoring, all variants answer the same batches in turn, several rounds over, image processing included.
"""

import argparse
import contextlib
import json
import os
import platform
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
from torch import Tensor

import llava_apt
from llava_apt.data import read_records
from llava_apt.lmms_eval_plugin import LlavaAptSimple
from llava_apt.prompt import question_prompt

TASK = "photoshapes_vqa"
TYPES = ("yes/no", "shape", "colour", "count", "position")
SETTINGS = {"max_new_tokens": 4}


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
    return {kind: 100 * measured[f"accuracy{' ' * bool(kind)}{kind},none"] for kind in ("", *TYPES)}


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
        for kind in ("", record["question_type"]):
            correct[kind].append(known.most_common(1)[0][0] == answer)
    return {kind: 100 * statistics.mean(correct[kind]) for kind in ("", *TYPES)}


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


def markdown(report: dict) -> str:
    def row(name: str, accuracy: dict, tokens: str, content: str, rate: str) -> str:
        cells = [name, *(f"{accuracy[kind]:.1f}" for kind in ("", *TYPES)), tokens, content, rate]
        return f"| {' | '.join(cells)} |"

    head = ["", "all", *TYPES, "image tokens", "without padding", "samples/s"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines.append(row("most frequent answer", report["majority"], "", "", ""))
    for name, measured in report["variants"].items():
        rate = f"{statistics.median(measured['samples_per_second']):.2f}"
        lines.append(
            row(name, measured["accuracy"], f"{measured['tokens']:.1f}", f"{measured['content_tokens']:.1f}", rate)
        )
    setup = report["setup"]
    versions = ", ".join(f"{name} {number}" for name, number in setup["versions"].items())
    return "\n".join(
        [
            "# A small LLaVA on PhotoShapes' questions",
            "",
            f"Accuracy in percent on {setup['questions']} questions about {setup['images']} validation images, scored "
            "by lmms-eval; counting and position apart, because that is where token reduction tends to hurt. Image "
            "tokens are the mean per image, in all and without the square padding's share. Samples/s: median of "
            f"{setup['rounds']} interleaved rounds, image processing included, batch {setup['batch_size']}. The "
            f"patches of APT, resizing and random: {setup['thresholds']} (pixels=bits). Before its fine-tune APT is "
            "resizing, because ZeroMLP starts at zero. The first line answers each question as training most often "
            "does.",
            "",
            *lines,
            "",
            f"Machine: {setup['machine']}. {versions}.",
            "",
            f"Command: `{setup['command']}`",
            "",
        ]
    )


def machine(device: str, threads: int) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {threads} of {os.cpu_count()} CPU threads"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def run(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    common = dict(batch_size=args.batch_size, device=args.device)
    merged = dict(pretrained=str(args.dense), thresholds=args.thresholds, **common)
    options = {
        "dense": dict(pretrained=str(args.dense), thresholds="off", **common),
        "random": dict(merge="random", **merged),
        "resizing": dict(merge="resizing", **merged),
        "APT before": merged,
        "APT": dict(new_layers=str(args.new_layers), **merged),
    }
    models = {name: LlavaAptSimple(**chosen) for name, chosen in options.items()}
    rates = speeds(models, args.data, args.speed_samples, args.rounds)
    records = read_records(args.data / "vqa_validation.json")[: args.limit]
    names = sorted({record["image"] for record in records})
    pictures = [load(args.data, name) for name in names]
    with task_manager(args.data) as manager:
        variants = {
            name: {
                "samples_per_second": rates[name],
                **tokens_per_image(model, pictures),
                "accuracy": score(model, manager, args.limit),  # lmms-eval frees the model afterwards
            }
            for name, model in models.items()
        }
    return {
        "majority": majority(args.data, args.limit),
        "variants": variants,
        "setup": {
            "questions": len(records),
            "images": len(names),
            "rounds": args.rounds,
            "speed_samples": args.speed_samples,
            "batch_size": args.batch_size,
            "thresholds": args.thresholds,
            "machine": machine(args.device, args.threads),
            "versions": {name: version(name) for name in ("torch", "transformers", "lmms-eval")},
            "command": shlex.join(["python", "tools/photoshapes_vqa_results.py", *sys.argv[1:]]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder that tools/make_photoshapes.py made")
    add("dense", type=Path, help="checkpoint that tools/train_photoshapes_vqa.py made")
    add("new_layers", type=Path, help="folder or file that llava_apt.finetune made from it")
    add("--thresholds", default="28=4.5", metavar="PIXELS=BITS", help="as fine-tuned with (%(default)s)")
    add("--output", type=Path, default=Path("docs/results/photoshapes_vqa"), help="without ending (%(default)s)")
    add("--batch-size", type=int, default=16, help="(%(default)s)")
    add("--limit", type=int, help="only so many questions")
    add("--speed-samples", type=int, default=128, help="questions a round (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    try:
        report = run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    write(args.output.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
