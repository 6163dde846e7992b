#!/usr/bin/env python
"""Box AP against tokens on photographs of COCO val2017: smaller images, adaptive patches, random dropping, ToMe.

examples:
  python -m benchmarks.equal_tokens_boxes coco/val2017 coco/annotations/instances_val2017.json
  python -m benchmarks.equal_tokens_boxes photos/ boxes.json --weights dinov2_s14.safetensors

A frozen DINOv2 ViT-S/14, a simple feature pyramid on its last map, and mmdet's ATSS head. Of the photographs that are
there, ordered by their ids, seven tenths train the head and the scorer, a tenth (val) calibrates thresholds, and a
fifth (test) is measured. Finished steps are kept in the work directory: the same command resumes.
"""

import contextlib
import io
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.cli import run
from apt_backbones.checkpoint import read_file
from apt_backbones.distill import Views, merging_losses, save_tensors
from apt_backbones.files import write_atomically
from apt_backbones.images import read_rgb
from apt_backbones.mm.det import SimpleFeaturePyramid

from .study import MERGED, PATCH, Setting, Study, about, between, console, study_parser, text

BASE = (336, 448)  # of 4:3; upright images are turned, and those between are square
SMALLER = ((196, 266), (224, 294), (252, 336), (280, 378), (308, 406))
TRAINED_AT = ((252, 336), BASE)  # the head sees both, so that it reads smaller images as well
LEVELS = (7, 14, 28, 56, 112)  # strides; the coarsest is for objects that fill the image
CHANNELS, EPOCHS, BATCH, RATE = 96, 8, 8, 1e-3
SEEDS = (0,)
DRAWS = 50  # samples of the test images for the error bar
KINDS = ("mAP", "small", "medium", "large", "person", "any class")
WITH_ERRORS = ("mAP", "person", "any class")
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the image's tokens
SHARD = 64


class Photo(NamedTuple):
    """A photograph of width x height pixels with its boxes (N, 4), corners in its own pixels, and classes (N,)."""

    id: int
    path: Path
    width: int
    height: int
    boxes: Tensor
    classes: Tensor


def read_photos(folder: Path, coco: COCO) -> dict[str, list[Photo]]:
    """The photographs of each split that the folder holds; crowds are left out."""
    files = {path.name: path for path in folder.rglob("*.jpg")}
    number = {category: index for index, category in enumerate(sorted(coco.getCatIds()))}
    photos = []
    for entry in sorted(coco.dataset["images"], key=lambda entry: entry["id"]):
        if (path := files.get(entry["file_name"])) is not None:
            found = [a for a in coco.imgToAnns[entry["id"]] if not a.get("iscrowd")]
            boxes = torch.tensor([a["bbox"] for a in found]).view(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            classes = torch.tensor([number[a["category_id"]] for a in found], dtype=torch.long)
            photos.append(Photo(entry["id"], path, entry["width"], entry["height"], boxes, classes))
    if not photos:
        raise FileNotFoundError(f"{folder} holds none of the images that the annotations name")
    first, second = round(0.7 * len(photos)), round(0.8 * len(photos))
    return {"train": photos[:first], "val": photos[first:second], "test": photos[second:]}


def shape_of(image: Photo | Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which the network sees an image: ``size``, upright, or a square of about as many cells."""
    if image.width > 1.15 * image.height:
        return size
    if image.height > 1.15 * image.width:
        return size[::-1]
    side = round((size[0] * size[1]) ** 0.5 / PATCH) * PATCH
    return side, side


class Detector(nn.Module):
    """A small ViTDet: what reads the trunk's map."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.neck = SimpleFeaturePyramid(channels, CHANNELS)
        del self.neck.p2  # its stride of a quarter patch costs more than all others
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.head = MODELS.build(
                ConfigDict(
                    type="ATSSHead",
                    num_classes=num_classes,
                    in_channels=CHANNELS,
                    feat_channels=CHANNELS,
                    stacked_convs=1,
                    anchor_generator=dict(
                        type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=LEVELS
                    ),
                    bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
                    loss_cls=dict(type="FocalLoss", use_sigmoid=True),
                    loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
                    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1),
                    test_cfg=dict(
                        nms_pre=1000,
                        min_bbox_size=0,
                        score_thr=0.01,
                        nms=dict(type="nms", iou_threshold=0.6),
                        max_per_img=100,
                    ),
                )
            )
        self.head.init_weights()

    def levels(self, maps: Tensor) -> tuple[Tensor, ...]:
        p3, p4, p5 = (level(maps.float()).contiguous() for level in (self.neck.p3, self.neck.p4, self.neck.p5))
        return p3, p4, p5, p5[:, :, ::2, ::2].contiguous(), p5[:, :, ::4, ::4].contiguous()

    def probabilities(self, maps: Tensor) -> Tensor:
        """Of the classes and of none on the base cells (B, classes + 1, H, W): the mean of the two finest levels."""
        finest, base, *_ = self.head(self.levels(maps))[0]
        parts = []
        for logits in (finest, base):
            none = logits.new_zeros(len(logits), 1, *logits.shape[2:])
            parts.append(torch.cat([logits, none], 1).softmax(1))
        return (nn.functional.adaptive_avg_pool2d(parts[0], parts[1].shape[2:]) + parts[1]) / 2


class BoxStudy(Study):
    """The network on photographs, and detectors that read its maps."""

    distill_epochs = 6  # of three times as many images as CamVid has

    def __init__(self, folder: Path, annotations: Path, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        super().__init__(weights, work_dir, dtype, (11,))
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(annotations))
        self.photos = read_photos(folder, self.coco)

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        return (pixels_of(read_rgb(photo.path), size) for photo in self.photos[split])

    def dense(self, split: str, size: tuple[int, int], mirrored: bool = False) -> list[tuple[Tensor, DetDataSample]]:
        """Maps of a split without merging, float16 (C, H, W), with what they show."""
        self.vit.thresholds, found = {}, []
        name = f"{split}_{text(size)}{'_mirrored' * mirrored}"
        for start in track(range(0, len(self.photos[split]), SHARD), f"dense {name}", console=console):
            file = self.work_dir / "dense" / name / f"{start}.safetensors"
            part = self.photos[split][start : start + SHARD]
            if not file.is_file():
                pixels = {str(photo.id): pixels_of(read_rgb(photo.path), size) for photo in part}
                save_tensors(file, {k: self.maps(x.flip(3) if mirrored else x)[0] for k, x in pixels.items()})
            maps = load_file(file)
            found += [(maps[str(photo.id)], sample_of(photo, size, mirrored)) for photo in part]
        return found

    def detector(self, seed: int) -> Detector:
        """Trained on dense maps of two sizes, and of mirrored images."""
        file = self.work_dir / f"detector_{seed}.safetensors"
        torch.manual_seed(seed)
        detector = Detector(self.vit.embed_dim, len(self.coco.getCatIds()))
        if not file.is_file():
            variants = [(size, mirrored) for size in TRAINED_AT for mirrored in (False, True)]
            data = [item for variant in variants for item in self.dense("train", *variant)]
            train_detector(detector, data, seed, self.work_dir / f"detector_{seed}_training.pth")
            save_tensors(file, detector.state_dict())
        detector.load_state_dict(load_file(file))
        return detector.eval().requires_grad_(False)

    @torch.no_grad()
    def views(self, split: str) -> list[Views]:
        """With what the first detector's probabilities lose by merging, at two sizes."""
        detector, groups = self.detector(SEEDS[0]), {}
        for size in TRAINED_AT:
            for pixels, (maps, _) in zip(self.images(split, size), self.dense(split, size)):
                losses = merging_losses(detector.probabilities(maps[None]), (2,))[0]
                groups.setdefault(pixels.shape, []).append((pixels, losses))
        return [
            Views(torch.cat([pixels for pixels, _ in group]), {MERGED: torch.cat([losses for _, losses in group])})
            for group in groups.values()
        ]

    def detections(self, setting: Setting) -> dict:
        """Tokens per image of the test split, and every seed's detections."""

        def measure() -> dict:
            detectors = [self.detector(seed) for seed in SEEDS]
            stored = self.dense("test", setting.image) if setting.method == "dense" else None
            found, tokens = [[] for _ in SEEDS], 0.0
            torch.manual_seed(0)
            with self.as_set(setting):
                for index, photo in enumerate(track(self.photos["test"], setting.name, console=console)):
                    if stored is None:
                        maps, count = self.maps_of(setting, pixels_of(read_rgb(photo.path), setting.image))
                        sample = sample_of(photo, setting.image)
                    else:
                        (features, sample), maps = stored[index], stored[index][0][None]
                        count = features.shape[1] * features.shape[2]
                    tokens += count
                    for detector, lines in zip(detectors, found):
                        lines += [[photo.id, *line] for line in detections_of(detector, maps, sample)]
            return {"tokens": tokens / len(self.photos["test"]), "detections": found}

        return self.kept(f"{setting.name}_detections", measure)

    def quality(self, setting: Setting) -> dict:
        """Tokens per image, and every seed's average precisions, on the test split."""

        def measure() -> dict:
            kept, ids = self.detections(setting), [photo.id for photo in self.photos["test"]]
            return {
                "tokens": kept["tokens"],
                "AP": [average_precisions(self.coco, ids, lines, DRAWS) for lines in kept["detections"]],
            }

        return self.kept(f"{setting.name}_AP", measure)


def pixels_of(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 (1, 3, height, width) as the network sees an image at a size."""
    resized = image.resize(shape_of(image, size)[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]


def sample_of(photo: Photo, size: tuple[int, int], mirrored: bool = False) -> DetDataSample:
    """What mmdet's heads take beside maps: boxes in the pixels that the network sees."""
    shape = shape_of(photo, size)
    scale = (shape[1] / photo.width, shape[0] / photo.height)
    boxes = photo.boxes * torch.tensor([*scale, *scale])
    if mirrored:
        boxes = torch.stack([shape[1] - boxes[:, 2], boxes[:, 1], shape[1] - boxes[:, 0], boxes[:, 3]], 1)
    meta = dict(img_shape=shape, pad_shape=shape, ori_shape=(photo.height, photo.width), scale_factor=scale)
    return DetDataSample(metainfo=meta, gt_instances=InstanceData(bboxes=boxes, labels=photo.classes))


def train_detector(detector: Detector, data: list[tuple[Tensor, DetDataSample]], seed: int, state: Path) -> None:
    """Train on maps (C, H, W) and what they show; batches are of one shape."""
    shapes = {}
    for index, (maps, _) in enumerate(data):
        shapes.setdefault(maps.shape, []).append(index)
    optimizer = torch.optim.AdamW(detector.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * sum(len(group) // BATCH for group in shapes.values())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    first = 0
    if state.is_file():
        kept = read_file(state)
        detector.load_state_dict(kept["detector"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        first = kept["epoch"]
    for epoch in range(first, EPOCHS):
        chance, batches = random.Random(f"{seed} {epoch}"), []
        for group in shapes.values():
            order = chance.sample(group, len(group))
            batches += [order[start : start + BATCH] for start in range(0, len(group) - BATCH + 1, BATCH)]
        chance.shuffle(batches)
        total = 0.0
        for batch in track(batches, f"detector {seed}, epoch {epoch + 1}/{EPOCHS}", console=console):
            samples = [data[index][1] for index in batch]
            losses = detector.head.loss(detector.levels(torch.stack([data[index][0] for index in batch])), samples)
            loss = sum(sum(parts) for parts in losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        console.print(f"detector {seed}, epoch {epoch + 1}: loss {total / len(batches):.4f}", highlight=False)
        kept = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict()}
        content = {**kept, "schedule": schedule.state_dict(), "epoch": epoch + 1}
        write_atomically(state, lambda unfinished: torch.save(content, unfinished))  # noqa: B023


@torch.no_grad()
def detections_of(detector: Detector, maps: Tensor, sample: DetDataSample) -> list[list[float]]:
    """Lines of image id, x, y, width, height, score, class, in the photograph's own pixels, rounded."""
    (found,) = detector.head.predict(detector.levels(maps), [sample], rescale=True)
    corners = found.bboxes
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    lines = torch.cat([boxes, found.scores[:, None], found.labels[:, None]], 1)
    return [[round(value, 4) for value in line] for line in lines.tolist()]


def average_precisions(coco: COCO, image_ids: Sequence[int], lines: Sequence[Sequence[float]], draws: int) -> dict:
    """COCO's box AP in percent: of all classes, of small, medium and large objects, of persons, and of objects of
    whatever class (``any class``, which has the least error); and for the error bar those of ``WITH_ERRORS`` in
    samples of the images drawn with replacement.

    Args:
        lines: image id, x, y, width, height, score, class of every detection.
        draws: how many samples.
    """
    categories = sorted(coco.getCatIds())
    detections = np.array(lines, np.float64).reshape(-1, 7)
    detections[:, 6] = np.array(categories)[detections[:, 6].astype(int)]
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(detections)
        precision, by_class = _evaluate(COCOeval(coco, found, "bbox"), image_ids, draws)
        of_any = COCOeval(coco, found, "bbox")
        of_any.params.useCats = 0
        precision_of_any, any_class = _evaluate(of_any, image_ids, draws)
    person = categories.index(next(c["id"] for c in coco.dataset["categories"] if c["name"] == "person"))
    result = {name: _mean(precision[..., area]) for area, name in enumerate(("mAP", "small", "medium", "large"))}
    result |= {"person": _mean(precision[:, :, person, 0]), "any class": _mean(precision_of_any[..., 0])}
    pairs = zip(by_class, any_class)
    result["draws"] = [[_mean(of_all), _mean(of_all[:, :, person]), _mean(any_)] for of_all, any_ in pairs]
    return result


def _evaluate(evaluation: COCOeval, image_ids: Sequence[int], draws: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Precisions (thresholds, recalls, classes, areas) with the most detections, and of every sample of the images
    those of objects of any area (thresholds, recalls, classes)."""
    evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, samples = evaluation.eval["precision"][..., -1], []
    areas, count = len(evaluation.params.areaRng), len(image_ids)
    whole, chance = np.array(evaluation.evalImgs, object).reshape(-1, areas, count), random.Random(0)
    evaluation._paramsEval.areaRng = evaluation.params.areaRng = evaluation.params.areaRng[:1]
    for _ in range(draws):
        evaluation.evalImgs = list(whole[:, :1, chance.choices(range(count), k=count)].flatten())
        evaluation.accumulate()
        samples.append(evaluation.eval["precision"][..., 0, -1])
    return precision, samples


def _mean(precision: np.ndarray) -> float:
    """In percent, over all that has objects."""
    return float(100 * precision[precision > -1].mean())


def all_settings() -> list[Setting]:
    def tokens(share: float) -> int:
        return round(share * Setting("dense", BASE).cells)

    dense = [Setting("dense", size) for size in (*SMALLER, BASE)]
    learned = [Setting("apt", BASE, "learned", tokens(share), fill="interpolate") for share in BUDGETS]
    learned += [Setting("apt", BASE, "learned", tokens(share)) for share in BUDGETS[1::2]]
    pixel = [Setting("apt", BASE, scorer, tokens(0.6), fill="interpolate") for scorer in ("entropy", "upsample_mse")]
    others = [Setting(method, BASE, None, tokens(0.6)) for method in ("random", "tome")]
    return dense + learned + pixel + others


def lines_of(setting: Setting, quality: dict, ms: float) -> list[dict]:
    """Entries of the results file, one per seed of the detector."""
    point = {**setting.about, "tokens": round(quality["tokens"], 1), "split": "test", "ms": round(ms, 1)}
    lines = []
    for seed, found in enumerate(quality["AP"]):
        values = {name: round(value, 2) for name, value in found.items() if name != "draws"}
        lines.append({**point, **values, "seed": seed})
    return lines


def gains(measured: dict[Setting, dict]) -> list[dict]:
    """AP over that of dense images with as many tokens, means over seeds; between two sizes the dense curve is a
    straight line. ``errors`` are standard deviations of the gains over samples of the test images."""

    def mean(quality: dict, name: str) -> float:
        return statistics.mean(of_seed[name] for of_seed in quality["AP"])

    def draws(quality: dict, which: int) -> list[float]:
        return [statistics.mean(v[which] for v in values) for values in zip(*(q["draws"] for q in quality["AP"]))]

    dense = sorted((q for s, q in measured.items() if s.method == "dense"), key=lambda quality: quality["tokens"])
    entries = []
    for setting, quality in measured.items():
        if setting.method == "dense":
            continue
        tokens = quality["tokens"]
        entry = {**setting.about, "tokens": round(tokens, 1)}
        for name in KINDS:
            at = between([(part["tokens"], mean(part, name)) for part in dense], tokens)
            entry[name] = [round(mean(quality, name), 2), None if at is None else round(mean(quality, name) - at, 2)]
        entry["errors"] = None
        if entry["mAP"][1] is not None:
            entry["errors"] = {}
            for which, name in enumerate(WITH_ERRORS):
                by_draw = zip(draws(quality, which), zip(*(draws(part, which) for part in dense)))
                differences = [
                    value - between(list(zip((part["tokens"] for part in dense), curve)), tokens)
                    for value, curve in by_draw
                ]
                entry["errors"][name] = round(statistics.stdev(differences), 2)
        entries.append(entry)
    return entries


def draw(path: Path, results: list[dict]) -> None:
    """AP on the test split against tokens; of all objects, and of small ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def name_of(line: dict) -> str:
        if line["method"] == "dense":
            return "dense, smaller images"
        return f"{line['scorer'] or line['method']}, image of {line['image']}"

    titles = {"mAP": "all classes", "any class": "objects of any class", "small": "small objects", "person": "persons"}
    figure, panels = plt.subplots(1, 4, figsize=(19, 5), layout="constrained")
    for panel, key in zip(panels, titles):
        for name in dict.fromkeys(map(name_of, results)):
            lines = [line for line in results if name_of(line) == name]
            points = sorted({line["tokens"] for line in lines})
            values = [[line[key] for line in lines if line["tokens"] == point] for point in points]
            style = dict(color="black", linestyle="--") if "dense" in name else {}
            means = [statistics.mean(value) for value in values]
            panel.errorbar(
                points, means, [statistics.pstdev(value) for value in values], label=name, marker="o", **style
            )
        panel.set(xlabel="tokens per image", title=titles[key])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=f"box AP on the test split, mean of {len(SEEDS)} detectors")
    panels[0].legend(fontsize="small")
    figure.suptitle("COCO photographs, frozen DINOv2 ViT-S/14, small ViTDet with ATSS head")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = study_parser(__doc__, "equal_tokens_boxes")
    parser.add_argument("images", type=Path, help="folder with (some of) the photographs")
    parser.add_argument("annotations", type=Path, help="COCO's instances_val2017.json")
    parser.add_argument("--out", type=Path, default=Path("docs/results/equal_tokens_coco.json"))
    args = parser.parse_args()
    study = BoxStudy(args.images, args.annotations, args.weights, args.work_dir, getattr(torch, args.dtype))
    settings, results = all_settings(), []
    measured = {setting: study.quality(setting) for setting in settings}
    photos = study.photos["test"]
    times = study.times(settings, lambda n, size: pixels_of(read_rgb(photos[n * (len(photos) // 4)].path), size))
    for setting, quality in measured.items():
        results += lines_of(setting, quality, times[setting.name])
    content = {
        **about("equal_tokens_boxes", args),
        "images": {split: " ".join(str(photo.id) for photo in part) for split, part in study.photos.items()},
        "gains": gains(measured),
        "results": results,
    }
    write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    draw(args.out.with_suffix(".png"), results)


if __name__ == "__main__":
    run(main)
