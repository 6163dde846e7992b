#!/usr/bin/env python
"""Accuracy against tokens and milliseconds in classification: a frozen DINOv2-S, linear heads, images by class.

examples:
  python -m benchmarks.equal_tokens_classes clothing-dataset-small
  python -m benchmarks.equal_tokens_classes photos/ --official --weights dinov2_s14.safetensors

The folder holds train, validation and test. From 1,200 images of train three things learn without labels: a scorer,
from how much merging changes the CLS token; adapters of merged tokens; and LoRA in the dense network, to say of smaller
images what it says of larger ones. Heads learn from dense images of 224 pixels: with --official from those of train and
validation, and are tested on test; else from four fifths of all images, and are tested on the fifth that is left, five
times (small test splits tell nothing from chance), without the 1,200. They read the CLS token, or the mean over the
tokens of the image: with merged tokens by their area, as ``adapt`` has it, or every token once. Thresholds are
calibrated on the validation images. What is finished is kept in the work directory: the same command resumes.
"""

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tools.cli import run
from apt_backbones import adapt
from apt_backbones.distill import Views, ViewSettings, make_views, save_tensors
from apt_backbones.files import write_atomically
from apt_backbones.merging_losses import image_losses
from apt_backbones.trunk import AdaptiveTrunk
from tools.drawing import chart
from tools.steps import stamps

from . import tome
from .study import MERGED, RANK, Setting, Study, about, between, console, parsed, study_parser, train_head

SPLITS = ("train", "validation", "test")
BASE = (224, 224)
OTHERS = ((196, 196), (252, 252))  # base sizes, too
SMALLER = ((140, 140), (168, 168), (182, 182))
TUNED = (*SMALLER, (196, 196))  # sizes that LoRA learns to read
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the image's tokens
POOLS = ("cls", "mean by area", "mean by token")
MEASURES = {"accuracy": 100, "cross_entropy": 1, "divergence": 1}  # and their units
FOLDS, DRAWS = 5, 200
UNLABELLED, COPIES = 1200, 4  # images, and views of each that the scorer learns from
VIEWS_OF_A_STEP = 8  # of the training of adapters and LoRA


class ClassStudy(Study):
    """The network on images by class, and heads that read what it says of a whole image.

    Args:
        folder: with train, validation and test, a folder per class in each.
        official: test on the test split, with one head.
    """

    def __init__(self, folder: Path, official: bool, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        self.folder, self.official = folder, official
        if missing := [split for split in SPLITS if not (folder / split).is_dir()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: it needs a folder per class in each")
        found = [ImageFolder(folder / split) for split in SPLITS]
        files = stamps(path for of_split in found for path, _ in of_split.samples)
        super().__init__(weights, work_dir, dtype, (-1,), images=files, official=official)
        number_of = found[0].class_to_idx  # another split may lack some
        self.labels = torch.tensor([number_of[of_split.classes[n]] for of_split in found for n in of_split.targets])
        self.is_test_split = torch.arange(len(self.labels)) >= len(self.labels) - len(found[-1])
        paths = [Path(path) for path, _ in found[0].samples]
        unlabelled = sorted(random.Random(0).sample(range(len(paths)), min(UNLABELLED, len(paths) // 2)))
        self.unlabelled = [paths[number] for number in unlabelled]
        is_tested = self.is_test_split | (not official)
        is_tested[unlabelled] = False
        self.tested = is_tested.nonzero()[:, 0]
        self.prepare = transforms.Resize(BASE[0], transforms.InterpolationMode.BICUBIC)  # of training views
        self.views_of_training = ViewSettings(BASE, scales=(1.0, 1.4), copies=COPIES)

    def build(self) -> nn.Module:
        vit = adapt(super().build(), {MERGED: 0.0}, merge="resizing", adapter_rank=RANK)
        vit.thresholds = {}
        return vit

    def pictures(self, splits: Sequence[str], size: tuple[int, int]) -> Dataset:
        """Pixels 0..255 (3, height, width), and a class."""
        steps = [transforms.Resize(size[0], transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
        transform = transforms.Compose([*steps, transforms.PILToTensor()])
        return ConcatDataset([ImageFolder(self.folder / split, transform) for split in splits])

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        return (pixels[None] for pixels, _ in self.pictures(["validation" if split == "val" else split], size))

    def views(self, split: str) -> list[Views]:
        """Of the unlabelled images, every tenth for "val", with what merging loses of the CLS token."""
        held_out = self.unlabelled[::10]
        paths = [path for path in self.unlabelled if path not in held_out] if split == "train" else held_out

        def cls_token(pixels: Tensor) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                return self.vit(self.normalized(pixels))

        torch.manual_seed(0)
        losses = image_losses(self.vit, cls_token, (MERGED,))
        report = partial(track, description=f"views of {split}", console=console)
        folder = self.work_dir / f"views_{split}"
        return [make_views(paths, losses, (MERGED,), self.views_of_training, folder, self.prepare, report=report)]

    def adapters_file(self) -> Path:
        """Learned from the CLS token, with the thresholds of all budgets of the heads' image size."""
        settings = [setting for setting in all_settings() if setting.adapters and setting.image == BASE]
        options = dict(batch=VIEWS_OF_A_STEP, prepare=self.prepare)
        return self.trained_layers("adapters", settings, self.vit, self.unlabelled, self.views_of_training, **options)

    @cached_property
    def with_lora(self) -> AdaptiveTrunk:
        """It learned, as the adapters did, to give of smaller images the CLS token that it gives of ``BASE``."""
        settings = self.views_of_training, VIEWS_OF_A_STEP, self.prepare
        return self.trained_lora(TUNED, AdaptiveTrunk.__call__, "features", self.unlabelled, *settings)

    @torch.inference_mode()
    def features(self, setting: Setting, every: bool = False) -> dict[str, Tensor]:
        """Per pooling the features of the images that are tested, or of every image (N, C), and ``tokens``, the number
        of their patch tokens (N,)."""
        file = self.work_dir / "features" / f"{setting.name}{'_every' if every else ''}.safetensors"
        if not file.is_file():
            found = {name: [] for name in (*POOLS, "tokens")}
            torch.manual_seed(0)
            pictures = self.pictures(SPLITS, setting.image)
            batches = DataLoader(pictures if every else Subset(pictures, self.tested), 16, num_workers=1)
            with self.as_set(setting):
                for pixels, _ in track(batches, file.stem, console=console):
                    with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                        of_batch = self.pooled(setting, self.normalized(pixels))
                    for parts, part in zip(found.values(), of_batch):
                        parts.append(part)
            save_tensors(file, {name: torch.cat(parts) for name, parts in found.items()})
        return load_file(file)

    def pooled(self, setting: Setting, images: Tensor) -> tuple[Tensor, ...]:
        """Per pooling the features of a batch (B, C), and its tokens (B,)."""
        if setting.method == "tome":
            *before, (x_BND, token_of_cell, count) = tome.after_blocks(self.vit, images, self.merges(setting))
            x_BND = self.vit.norm(x_BND.float())
            of_cells = x_BND.gather(1, token_of_cell[..., None].expand(-1, -1, x_BND.shape[2]))
            tokens = (sum(part[2] for part in before) + count) / len(self.vit.blocks)
            return x_BND[:, 0], of_cells.mean(1), x_BND[:, 1:].mean(1), torch.full((len(images),), tokens)
        *_, (_, x_TD, layout) = self.vit.run(images)
        x_TD = self.vit.final_norm(x_TD.float())
        by_token = torch.stack([x.mean(0) for x in layout.split(x_TD)])
        return layout.prefix(x_TD)[:, 0], layout.to_map(x_TD).mean((2, 3)), by_token, torch.tensor(layout.num_patches)

    def folds(self) -> Tensor:
        """Of every image the number of the part in which it is tested; officially only the test split is."""
        if self.official:
            return 1 - self.is_test_split.long()
        return torch.tensor(random.Random(0).choices(range(FOLDS), k=len(self.labels)))

    def probabilities(self, settings: Sequence[Setting]) -> dict[tuple[Setting, str], Tensor]:
        """Per setting and pooling the probabilities of the tested images, by heads that did not learn from them."""
        folds, dense = self.folds(), self.features(Setting("dense", BASE), every=True)
        of_tested = folds[self.tested]
        learned_from = [folds != fold for fold in range(int(of_tested.max()) + 1)]
        num_classes = int(self.labels.max()) + 1
        heads = {
            pool: [train_head(dense[pool][part], self.labels[part], num_classes) for part in learned_from]
            for pool in POOLS
        }
        found = {}
        for setting in settings:
            features = self.features(setting)
            for pool in POOLS:
                of_heads = torch.stack([head(features[pool]).softmax(1) for head in heads[pool]])
                found[setting, pool] = of_heads[of_tested, torch.arange(len(of_tested))]
        return found


def values_of(probabilities: Tensor, labels: Tensor, dense: Tensor) -> Tensor:
    """``MEASURES`` of every image (3, N): whether it is classified correctly, its cross-entropy, and the
    Kullback-Leibler divergence from what the same head says of the dense image of size ``BASE``.

    Args:
        probabilities, dense: (N, classes).
        labels: (N,).
    """
    logarithms = [part.clamp(min=1e-8).log() for part in (probabilities, dense)]
    divergence = (dense * (logarithms[1] - logarithms[0])).sum(1)
    truth = logarithms[0].gather(1, labels[:, None])[:, 0]
    return torch.stack([(probabilities.argmax(1) == labels).float(), -truth, divergence])


def entry_of(
    setting: Setting, pool: str, tokens: float, curves: dict[str, list[tuple[float, Tensor]]], values: Tensor
) -> dict:
    """``MEASURES`` of a setting, accuracy in percent, and each of them over images of as many tokens.

    Args:
        curves: per kind of image it is compared with, tokens and values (3, N) of every size: "dense", read by the
            network as it is, and "lora", by the tuned one.
        values: of the setting.
    """
    entry = {**setting.about, "adapters": setting.adapters, "pool": pool, "tokens": round(tokens, 1)}
    index = [torch.arange(values.shape[1])]
    index += [
        torch.tensor(random.Random(draw).choices(range(values.shape[1]), k=values.shape[1])) for draw in range(DRAWS)
    ]
    for row, (name, unit) in enumerate(MEASURES.items()):
        entry[name] = round(unit * float(values[row].mean()), 3)
        for kind, curve in curves.items():
            gains = []
            for drawn in index:
                at = between([(of_size, float(found[row, drawn].mean())) for of_size, found in curve], tokens)
                gains.append(None if at is None else unit * (float(values[row, drawn].mean()) - at))
            known = setting.method not in ("dense", kind) and gains[0] is not None
            entry[f"{name}_over_{kind}"] = round(gains[0], 3) if known else None
            entry[f"{name}_over_{kind}_error"] = round(statistics.stdev(gains[1:]), 3) if known else None
    return entry


def draw(path: Path, results: list[dict]) -> None:
    """Accuracy by the CLS token against tokens and time; bars are standard deviations of what is gained or lost."""
    curves = {}
    for line in results:
        if line["pool"] == "cls":
            layers = " and adapters" if line["adapters"] else ""
            merging = f"merging, {line['scorer']}{layers}, image of {line['image']}"
            name = {
                "apt": merging,
                "dense": "dense, smaller images",
                "lora": "smaller images, LoRA",
                "tome": "ToMe",
            }.get(line["method"])
            curves.setdefault(name or line["method"], []).append(line)
    figure, panels = chart((16, 4.5), 2, sharey=True)
    for panel, (key, label) in zip(panels, (("tokens", "tokens per image"), ("ms", "CPU ms per image, one thread"))):
        for name, lines in curves.items():
            lines = sorted(lines, key=lambda line: line[key])
            values, errors = zip(*((line["accuracy"], line["accuracy_over_dense_error"] or 0) for line in lines))
            style = {"linestyle": "--", "color": "black"} if name.startswith("dense") else {}
            panel.errorbar([line[key] for line in lines], values, errors, label=name, marker="o", capsize=2, **style)
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy in %, CLS token")
    panels[0].set_title("Classification, frozen DINOv2 ViT-S/14, linear head")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=130)


def all_settings(also: Sequence[str] = ()) -> list[Setting]:
    """Of everything; ``also`` are files of other learned scorers."""

    def merging(size: tuple[int, int], method: str, scorer: str | None, shares: Sequence[float]) -> list[Setting]:
        cells = Setting("dense", size).cells
        return [Setting(method, size, scorer, round(share * cells)) for share in shares]

    settings = [Setting("dense", size) for size in sorted((*SMALLER, BASE, *OTHERS))]
    settings += [Setting("lora", size) for size in TUNED]
    for size in (BASE, *OTHERS):
        learned = merging(size, "apt", "learned", BUDGETS if size == BASE else BUDGETS[1::2])
        settings += learned if size == BASE else []
        settings += [setting._replace(adapters=True) for setting in learned]
    for method, scorer in (("apt", "entropy"), ("apt", "upsample_mse"), ("random", None), ("tome", None)):
        settings += merging(BASE, method, scorer, BUDGETS[1::2])
    for file in also:
        settings += merging(BASE, "apt", file, BUDGETS[1::2])
    return settings


def main() -> None:
    parser = study_parser(__doc__, "equal_tokens_classes")
    parser.add_argument("folder", type=Path, help="with train, validation and test, a folder per class in each")
    parser.add_argument("--official", action="store_true", help="test on the test split (default: five folds)")
    parser.add_argument("--out", type=Path, help="default: docs/results/equal_tokens_[FOLDER].json")
    args = parsed(parser)
    name, dtype = args.folder.resolve().name, getattr(torch, args.dtype)
    study = ClassStudy(args.folder, args.official, args.weights, args.work_dir / name, dtype)
    settings = all_settings(args.also)
    tokens = {setting: float(study.features(setting)["tokens"].float().mean()) for setting in settings}
    labels, probabilities, base = study.labels[study.tested], study.probabilities(settings), Setting("dense", BASE)
    results, times = [], study.times(settings)
    for pool in POOLS:
        values = {s: values_of(probabilities[s, pool], labels, probabilities[base, pool]) for s in settings}
        read = {"dense": [s for s in settings if s.method == "dense"]}
        read["lora"] = [base, *(s for s in settings if s.method == "lora")]
        curves = {kind: sorted((tokens[s], values[s]) for s in of_kind) for kind, of_kind in read.items()}
        entries = [entry_of(s, pool, tokens[s], curves, values[s]) for s in settings]
        results += [{**entry, "ms": round(times[s.name], 1)} for s, entry in zip(settings, entries)]
    content = {**about("equal_tokens_classes", args), "images": len(labels), "results": results}
    out = args.out or Path(f"docs/results/equal_tokens_{name}.json")
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    draw(out.with_suffix(".png"), results)


if __name__ == "__main__":
    run(main)
