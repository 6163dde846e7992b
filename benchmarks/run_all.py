#!/usr/bin/env python
"""All benchmarks that suit this machine, into one folder; a short table comes last.

examples:
  python benchmarks/run_all.py
  python benchmarks/run_all.py --list
  python benchmarks/run_all.py --out my_benchmarks --images photos/

Without a GPU: trunks, a segmenter with both heads, a small LLaVA, a training step and scoring, about 20 minutes on two
cores. With one, in bfloat16: whole models, trunks, LLaVA-1.5-7B, a training step and how cost grows, under 10 minutes
on an H200. Every part is a run of tools/benchmark.py in a process of its own with its own time limit: one that fails is
reported and does not stop the others, and what is finished is on disk. Parts that need mmcv's operators fail where they
are not installed; see benchmarks/build_mmcv_cuda.sh.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tools.cli import parser_of, run
from apt_backbones.files import write_atomically
from tools.results import markdown

ROOT = Path(__file__).resolve().parents[1]
TOOL = "tools/benchmark.py"  # of the checkout that it runs in: results quote the command
DET_B, DET_L = (f"det_configs/eva02_{size}_apt_1536.py" for size in "bl")
SEG_B, SEG_L = (f"seg_configs/eva02_{size}_apt_512.py" for size in "bl")


@dataclass(frozen=True)
class Part:
    """One run of the benchmark.

    Attributes:
        name: of its files.
        arguments: of tools/benchmark.py.
        minutes: it is stopped after these.
        on_request: it runs only if it is named.
    """

    name: str
    arguments: str
    minutes: float
    on_request: bool = False


PACKED, KEEPS = "--modes dense,packed,apt", "--keep 1 0.7 0.5"
WHOLE_DET = "--whole --modes dense,dense-rect,packed,apt,apt-rect --aspect 4:3 --stages"
WHOLE_SEG = "--whole --heads reference,fast --modes dense,apt --stages"
TRAINING = "--train-step --modes dense,apt"
GROWTH = "--img-sizes 512 1024 1536 2048 3072 --modes dense,apt --keep 1 0.85 0.7 0.5 0.3 --num-images 1"
TRUNK_1024 = "--img-sizes 1024 --modes dense,dense-rect,packed,apt"
CPU_PARTS = (
    Part("trunk_b_1024", f"{DET_B} {TRUNK_1024} {KEEPS} --num-images 2 --rounds 2 --stages", 15),
    Part("trunk_b_1536", f"{DET_B} {PACKED} {KEEPS} --num-images 1 --rounds 2 --stages", 20),
    Part("trunk_seg_l_512", f"{SEG_L} {PACKED} {KEEPS} --num-images 2 --rounds 2 --stages", 15),
    Part("whole_seg_b_512", f"{SEG_B} {WHOLE_SEG} --num-images 1 --rounds 2", 15),
    Part("llava_small", f"llava-small {PACKED} --num-images 2 --rounds 5 --stages", 10),
    Part("training_b_512", f"{DET_B} {TRAINING} --img-sizes 512 --num-images 1 --rounds 2", 10),
    Part("scorers", "--scorers --num-images 1 --rounds 2", 10),
    # Two blocks of twelve, a windowed and a global one: the large sizes would take hours with all.
    Part("growth_b", f"{DET_B} {GROWTH} --rounds 1 --blocks 2", 30, on_request=True),
    Part("whole_det_b_1024", f"{DET_B} {WHOLE_DET} --img-sizes 1024 --num-images 1 --rounds 2", 30, on_request=True),
)
GPU_PARTS = (
    Part("whole_det_l_1536", f"{DET_L} {WHOLE_DET}", 2.5),
    Part("trunk_l_1536_b1", f"{DET_L} {PACKED} {KEEPS} --aspect 1:1 --rounds 10 --stages", 1.5),
    Part("trunk_l_1536_b8", f"{DET_L} {PACKED} {KEEPS} --aspect 1:1 --batch-size 8 --stages", 2),
    Part("whole_seg_l_512_b8", f"{SEG_L} {WHOLE_SEG} --batch-size 8", 2),
    Part("trunk_seg_l_512_b8", f"{SEG_L} {PACKED} --batch-size 8 --rounds 10 --stages", 1.5),
    Part("llava_7b_b1", f"llava-1.5-7b {PACKED} --stages", 2),
    Part("llava_7b_b8", f"llava-1.5-7b {PACKED} --batch-size 8 --stages", 2),
    Part("scorers", "--scorers", 1),
    Part("training_l_1024", f"{DET_L} {TRAINING} --img-sizes 1024 --num-images 2", 2),
    Part("growth_l", f"{DET_L} {GROWTH} --rounds 3", 3),
    Part("trunk_l_1536_compiled", f"{DET_L} {PACKED} --keep 1 0.7 --aspect 1:1 --compile", 4),
    Part("llava_7b_b8_compiled", "llava-1.5-7b --modes dense,apt --batch-size 8 --num-images 1 --compile", 4),
)


def run_part(part: Part, folder: Path, common: list[str]) -> str | None:
    """Run one part; its output goes to a log. Returns what went wrong, or None."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    options = dict(cwd=ROOT, env=environment, timeout=60 * part.minutes)
    written = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    files = ["--json", str(written / f"{part.name}.json"), "--plot", str(written / f"{part.name}.png")]
    command = [sys.executable, TOOL, *shlex.split(part.arguments), *common, *files]
    log = folder / f"{part.name}.log"
    with log.open("w") as output:
        try:
            status = subprocess.run(command, stdout=output, stderr=output, **options).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {part.minutes:g} minutes"
    if status:
        lines = log.read_text().strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"
    return None


def summary_of(folder: Path, parts: list[Part]) -> list[list[str]]:
    """One line per mode of every finished result."""
    lines = []
    for part in parts:
        path = folder / f"{part.name}.json"
        for result in json.loads(path.read_text())["results"] if path.exists() else ():
            for row in result["rows"]:
                versus = {key.removeprefix("speed_vs_"): row[key] for key in row if key.startswith("speed_vs_")}
                speeds = [f"{speed['median']:.2f}x {name}" for name, speed in versus.items() if name != row["mode"]]
                memory = [f"{row['activations_gb']:.3g} GB stored"] if "activations_gb" in row else []
                kept = f"{row['content_kept']:.1%}"
                what = [part.name, result["title"], row["mode"], kept, f"{row['images_per_second']:.4g}"]
                lines.append([*what, ", ".join(speeds + memory) or "-"])
    return lines


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, help="folder (default: docs/benchmarks/NAME-OF-THE-HARDWARE)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--images", nargs="+", metavar="IMAGE|DIR", help="instead of scikit-image's photographs")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    all_parts = GPU_PARTS if has_gpu else CPU_PARTS
    if args.list:
        for part in all_parts:
            print(
                f"{part.name} ({'on request, ' * part.on_request}at most {part.minutes:g} minutes)\n  {part.arguments}"
            )
        return
    if unknown := set(args.only or ()) - {part.name for part in all_parts}:
        raise ValueError(f"no part {', '.join(sorted(unknown))} on this machine; --list names them")
    parts = [part for part in all_parts if (part.name in args.only if args.only else not part.on_request)]
    hardware = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if has_gpu else "cpu"
    folder = (args.out or ROOT / "docs/benchmarks" / hardware).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    common = ["--dtype", "bf16"] if has_gpu else []
    common += ["--images", *(str(Path(path).resolve()) for path in args.images)] if args.images else []

    console, failures = Console(width=None if sys.stdout.isatty() else 160), {}
    for part in parts:
        console.print(f"{part.name} ... ", end="")
        failure = run_part(part, folder, common)
        console.print("failed" if failure else "done")
        if failure:
            failures[part.name] = failure
    titles = ("part", "what", "mode", "content kept", "img/s", "median speed against")
    lines = summary_of(folder, list(all_parts))  # with what earlier runs left in the folder
    table = Table(*titles, title=f"Results in {folder}")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    write_atomically(folder / "summary.md", markdown(dict(zip(titles, zip(*lines)))))
    for name, failure in failures.items():
        console.print(f"{name} failed: {failure} (log: {folder / name}.log)", markup=False)
    sys.exit(bool(failures))


if __name__ == "__main__":
    run(main)
