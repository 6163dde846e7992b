#!/usr/bin/env python
"""Box AP against tokens on photographs of COCO val2017: smaller images, adaptive patches, random dropping, ToMe.

examples:
  python -m benchmarks.equal_tokens_boxes coco/val2017 coco/annotations/instances_val2017.json
  python -m benchmarks.equal_tokens_boxes photos/ boxes.json --weights dinov2_s14.safetensors

A frozen DINOv2 ViT-S/14; on its maps after blocks 6, 9 and 12 a simple feature pyramid with mmdet's Faster R-CNN, which
finds objects of any class, and a linear layer that tells their classes from the network's own features. Of the
photographs that are there, ordered by their ids, seven tenths train the heads and the scorer, a tenth (val) calibrates
thresholds, and a fifth (test) is measured. Finished steps are kept in the work directory: the same command resumes.
"""

import contextlib
import io
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial, reduce
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmcv.ops import roi_align
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from PIL import Image
from PIL.Image import Resampling, Transform
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.cli import run
from apt_backbones.checkpoint import read_file
from apt_backbones.distill import Views, ViewSettings, make_views, save_tensors
from apt_backbones.files import write_atomically
from apt_backbones.images import read_rgb
from apt_backbones.merging_losses import cell_losses, merging_losses
from apt_backbones.mm.det import SimpleFeaturePyramid
from tools.drawing import chart
from tools.mm_runs import ResampledPrecision, mean_precision
from tools.steps import stamps

from .coco import images_in, read_coco
from .study import MERGED, PATCH, Setting, Study, about, between, console, parsed, study_parser, text, train_head

BASE = (336, 448)  # of 4:3; upright images are turned, and those between are square
OTHERS = ((280, 378), (392, 518))  # base sizes, too
SMALLER = ((196, 266), (224, 294), (252, 336), (308, 406))
BLOCKS = (5, 8, 11)
TRAINED_AT = ((252, 336), (336, 252), (294, 294))  # of views of the photographs at many scales
ZOOMS = (0.5, 1.8)  # of a view, whose sides hold the whole photograph at 1
SCORED_AT = ((252, 336), BASE)  # what the scorer learns from, and random parts of the training photographs
PARTS = ViewSettings((252, 252), scales=(0.5, 0.95), copies=3)
LEVELS = (7, 14, 28, 56, 112)  # strides; the coarsest is for objects that fill the image
CHANNELS, EPOCHS, BATCH, RATE = 128, 10, 8, 1e-3
CLASS_VIEWS = 2  # of every photograph, for the classes
SEED = 0
LABELS = 3  # classes that a box may be of
DRAWS = 50  # samples of the test images for the error bar
KINDS = ("mAP", "small", "medium", "large", "person", "any class", "any class, small")
WITH_ERRORS = ("mAP", "person", "any class", "any class, small")
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the image's tokens


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
    number = {category: index for index, category in enumerate(sorted(coco.getCatIds()))}
    photos = []
    for entry, path in images_in(folder, coco):
        found = [a for a in coco.imgToAnns[entry["id"]] if not a.get("iscrowd")]
        boxes = torch.tensor([a["bbox"] for a in found]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([number[a["category_id"]] for a in found], dtype=torch.long)
        photos.append(Photo(entry["id"], path, entry["width"], entry["height"], boxes, classes))
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
    """What reads the trunk's maps (B, C, H, W): Faster R-CNN for objects of any class, and a linear layer for classes.

    Args:
        channels: C, of the maps of all blocks.
        num_classes: of the linear layer.
        dtype: in which convolutions are computed.
    """

    def __init__(self, channels: int, num_classes: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.standardize = nn.BatchNorm2d(channels, affine=False)
        self.reduce = nn.Conv2d(channels, 2 * CHANNELS, 1)
        self.neck = SimpleFeaturePyramid(2 * CHANNELS, CHANNELS)
        del self.neck.p2  # its stride of a quarter patch costs more than all others
        self.classes = nn.Linear(channels, num_classes)
        self.dtype = dtype
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.rpn = MODELS.build(ConfigDict(RPN))
            self.roi = MODELS.build(ConfigDict(ROI))
        self.rpn.init_weights()
        self.roi.init_weights()
        for part in (self.rpn, self.roi.bbox_head):  # mmcv's operators are in float32
            part.forward = self._lower(part.forward)

    def _lower(self, function: Callable) -> Callable:
        def of_float(found: Tensor | Sequence) -> Tensor | Sequence:
            return found.float() if isinstance(found, Tensor) else type(found)(map(of_float, found))

        def forward(*inputs: Tensor | Sequence[Tensor]) -> Tensor | Sequence:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                found = function(*inputs)
            return of_float(found)

        return forward

    def levels(self, standardized: Tensor) -> tuple[Tensor, ...]:
        def pyramid(x: Tensor) -> tuple[Tensor, ...]:
            x = self.reduce(x)
            return tuple(level(x).contiguous() for level in (self.neck.p3, self.neck.p4, self.neck.p5))

        p3, p4, p5 = self._lower(pyramid)(standardized)
        return p3, p4, p5, p5[:, :, ::2, ::2].contiguous(), p5[:, :, ::4, ::4].contiguous()

    def loss(self, maps: Tensor, samples: list[DetDataSample]) -> Tensor:
        """Of all but the classes; every image shows something."""
        maps = self.standardize(maps.float())
        levels, objects = self.levels(maps), [of_any_class(sample) for sample in samples]
        losses, proposals = self.rpn.loss_and_predict(levels, objects, proposal_cfg=ConfigDict(PROPOSALS))
        losses |= self.roi.loss(levels, proposals, objects)
        return sum(loss if isinstance(loss, Tensor) else sum(loss) for name, loss in losses.items() if "loss" in name)

    @torch.no_grad()
    def predict(self, maps: Tensor, sample: DetDataSample) -> Tensor:
        """Of one image, (N, 6): corners in its own pixels, score and class; up to ``LABELS`` classes per box."""
        levels = self.levels(self.standardize(maps.float()))
        (found,) = self.roi.predict(levels, self.rpn.predict(levels, [sample]), [sample])
        logits = self.classes(mean_inside(maps, [found.bboxes]))
        likely = logits.softmax(1).topk(min(LABELS, self.classes.out_features), 1)
        scores = found.scores[:, None] * likely.values
        scale = found.bboxes.new_tensor([*sample.scale_factor, *sample.scale_factor])
        corners = (found.bboxes / scale)[:, None].expand(-1, scores.shape[1], -1)
        return torch.cat([corners, scores[..., None], likely.indices[..., None]], 2).flatten(0, 1)

    def probabilities(self, maps: Tensor) -> Tensor:
        """Of the classes and of none on the base cells (B, classes + 1, H, W): whether there is an object, as the two
        finest levels have it, and the class of the cell."""
        levels = self.levels(self.standardize(maps.float()))
        finest, base, *_ = (logits.sigmoid().amax(1, keepdim=True) for logits in self.rpn(levels)[0])
        is_object = (nn.functional.adaptive_avg_pool2d(finest, base.shape[2:]) + base) / 2
        classes = self.classes(maps.float().movedim(1, -1)).softmax(-1).movedim(-1, 1)
        return torch.cat([is_object * classes, 1 - is_object], 1)


L1 = dict(type="L1Loss", loss_weight=1.0)
PROPOSALS = dict(nms_pre=500, max_per_img=256, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
RPN = dict(
    type="RPNHead",
    in_channels=CHANNELS,
    feat_channels=CHANNELS,
    anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0, 2.0], strides=LEVELS),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[1.0, 1.0, 1.0, 1.0]),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True),
    loss_bbox=L1,
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
        sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, add_gt_as_proposals=False),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=PROPOSALS,
)
ROI = dict(
    type="StandardRoIHead",
    bbox_roi_extractor=dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
        out_channels=CHANNELS,
        featmap_strides=LEVELS[:4],
        finest_scale=28,
    ),
    bbox_head=dict(
        type="Shared2FCBBoxHead",
        in_channels=CHANNELS,
        fc_out_channels=384,
        roi_feat_size=7,
        num_classes=1,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="CrossEntropyLoss"),
        loss_bbox=L1,
    ),
    train_cfg=dict(
        assigner=dict(
            type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False
        ),
        sampler=dict(type="RandomSampler", num=96, pos_fraction=0.33, add_gt_as_proposals=True),
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(score_thr=0.01, nms=dict(type="nms", iou_threshold=0.6), max_per_img=100),
)


class BoxStudy(Study):
    """The network on photographs, and detectors that read its maps."""

    distill_epochs = 16

    def __init__(self, folder: Path, annotations: Path, weights: Path | None, work_dir: Path, dtype: torch.dtype):
        self.coco = read_coco(annotations)
        if not self.coco.getCatIds(catNms=["person"]):
            raise ValueError(f"{annotations} has no class called person, which is shown apart")
        self.photos = read_photos(folder, self.coco)
        files = [photo.path for of_split in self.photos.values() for photo in of_split]
        super().__init__(weights, work_dir, dtype, BLOCKS, images=stamps(files), boxes=stamps([annotations]))

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        return (pixels_of(read_rgb(photo.path), size) for photo in self.photos[split])

    @cached_property
    def detector(self) -> Detector:
        """Trained on dense maps of views of the train split."""
        file = self.work_dir / f"detector_{SEED}.safetensors"
        torch.manual_seed(SEED)
        channels = len(self.blocks) * self.vit.embed_dim
        detector = Detector(channels, len(self.coco.getCatIds()), self.dtype)
        if not file.is_file():
            self.vit.thresholds = {}
            photos = [photo for photo in self.photos["train"] if len(photo.boxes)]
            train_detector(detector, photos, self.maps, SEED, file.with_name(f"{file.stem}_training.pth"))
            train_classes(detector.classes, photos, self.maps, SEED)
            save_tensors(file, detector.state_dict())
        detector.load_state_dict(load_file(file))
        return detector.eval().requires_grad_(False)

    def views(self, split: str) -> list[Views]:
        """With what the first detector's probabilities lose by merging: whole photographs at two sizes; to train on,
        also parts of them."""
        groups = {}
        for size in SCORED_AT:
            for pixels, losses in zip(self.images(split, size), self.losses(split, size)):
                groups.setdefault(pixels.shape, []).append((pixels, losses))
        found = [
            Views(torch.cat([pixels for pixels, _ in group]), {MERGED: torch.stack([losses for _, losses in group])})
            for group in groups.values()
        ]
        if split == "train":
            self.vit.thresholds, detector = {}, self.detector

            def outputs(pixels: Tensor) -> Tensor:
                return detector.probabilities(self.maps(pixels))

            paths, losses = [photo.path for photo in self.photos[split]], cell_losses(outputs, (MERGED,))
            report = partial(track, description="parts of photographs", console=console)
            found.append(make_views(paths, losses, (MERGED,), PARTS, self.work_dir / "parts", report=report))
        return found

    def losses(self, split: str, size: tuple[int, int]) -> list[Tensor]:
        """What the first detector's probabilities lose by merging in every photograph (H // 2, W // 2)."""
        file = self.work_dir / f"losses_{split}_{text(size)}.safetensors"
        if not file.is_file():
            detector, found, self.vit.thresholds = self.detector, {}, {}
            images = zip(self.photos[split], self.images(split, size))
            for photo, pixels in track(images, f"losses {split}", len(self.photos[split]), console=console):
                with torch.no_grad():
                    found[str(photo.id)] = merging_losses(detector.probabilities(self.maps(pixels)), (2,))[0][0]
            save_tensors(file, found)
        kept = load_file(file)
        return [kept[str(photo.id)] for photo in self.photos[split]]

    def detail_file(self) -> Path:
        """Learned from the first detector, with the thresholds of all budgets of the base size."""
        settings = [setting for setting in all_settings() if setting.image == BASE and setting.scorer == "learned"]
        views = ViewSettings((280, 280), scales=PARTS.scales)
        paths = [photo.path for photo in self.photos["train"]]
        return self.trained_detail(settings, self.detector.probabilities, paths, views)

    def detections(self, setting: Setting) -> dict:
        """Tokens per image of the test split, and the detections, in a list of their own."""

        def measure() -> dict:
            detector, found, tokens = self.detector, [], 0.0
            torch.manual_seed(0)
            with self.as_set(setting):
                for photo in track(self.photos["test"], setting.name, console=console):
                    maps, count = self.maps_of(setting, pixels_of(read_rgb(photo.path), setting.image))
                    tokens += count
                    boxes = detector.predict(maps, sample_of(photo, setting.image))
                    boxes[:, 2:4] -= boxes[:, :2]
                    found += [[photo.id, *(round(value, 4) for value in line)] for line in boxes.tolist()]
            return {"tokens": tokens / len(self.photos["test"]), "detections": [found]}

        return self.kept(f"{setting.name}_detections", measure)

    def quality(self, setting: Setting) -> dict:
        """Tokens per image, and the average precisions, in a list, on the test split."""

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


def sample_of(photo: Photo, size: tuple[int, int]) -> DetDataSample:
    """What mmdet's heads take beside maps: boxes in the pixels that the network sees."""
    shape = shape_of(photo, size)
    scale = (shape[1] / photo.width, shape[0] / photo.height)
    return shown(photo.boxes * torch.tensor([*scale, *scale]), photo.classes, shape, scale)


def shown(
    boxes: Tensor, classes: Tensor, shape: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)
) -> DetDataSample:
    """Boxes (N, 4), corners in the pixels of an image of ``shape``, and classes (N,), as mmdet has them.

    Args:
        scale: of the image's width and height over the photograph's.
    """
    meta = dict(img_shape=shape, pad_shape=shape, batch_input_shape=shape, ori_shape=shape, scale_factor=scale)
    return DetDataSample(metainfo=meta, gt_instances=InstanceData(bboxes=boxes, labels=classes))


def of_any_class(found: DetDataSample) -> DetDataSample:
    """The same boxes, all of class 0."""
    objects = found.gt_instances
    return shown(objects.bboxes, torch.zeros_like(objects.labels), found.img_shape)


def view_of(photo: Photo, size: tuple[int, int], chance: random.Random) -> tuple[Tensor, DetDataSample]:
    """A random view, uint8 (3, *size), grey beyond the photograph, and the boxes of which it holds two fifths."""
    (height, width), image = size, read_rgb(photo.path)
    zoom = math.exp(chance.uniform(*map(math.log, ZOOMS)))
    zoom *= min(width / photo.width, height / photo.height)
    image = image.resize([max(1, round(side * zoom)) for side in image.size], Resampling.BICUBIC)
    left, top = (chance.uniform(*sorted((0, seen - side))) for seen, side in zip((width, height), image.size))
    image = image.transform((width, height), Transform.AFFINE, (1, 0, -left, 0, 1, -top), fillcolor=(124, 116, 104))
    pixels, boxes = torch.from_numpy(np.array(image)).permute(2, 0, 1), photo.boxes * zoom
    boxes = boxes + torch.tensor([left, top, left, top])
    inside = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    seen, whole = (corners[:, 2:] - corners[:, :2] for corners in (inside, boxes))
    is_kept = (seen.clamp(min=0).prod(1) > 0.4 * whole.prod(1)) & (seen.amin(1) > 2)
    boxes = inside[is_kept]
    if chance.random() < 0.5:
        left, top, right, bottom = boxes.unbind(1)
        pixels, boxes = pixels.flip(2), torch.stack([width - right, top, width - left, bottom], 1)
    return pixels, shown(boxes, photo.classes[is_kept], size)


def train_detector(
    detector: Detector, photos: Sequence[Photo], maps_of: Callable[[Tensor], Tensor], seed: int, state: Path
) -> None:
    """Train on random views of photographs, each once an epoch.

    Args:
        maps_of: uint8 images (B, 3, height, width) -> the trunk's maps.
        state: is kept up to date after every epoch; training goes on from it.
    """
    optimizer = torch.optim.AdamW(detector.parameters(), RATE, weight_decay=0.05)
    steps = math.ceil(len(photos) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * steps, pct_start=0.05)
    first = 0
    if state.is_file():
        kept = read_file(state)
        detector.load_state_dict(kept["detector"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        first = kept["epoch"]
    for epoch in range(first, EPOCHS):
        chance, total = random.Random(f"{seed} {epoch}"), 0.0
        torch.manual_seed(EPOCHS * seed + epoch)
        order = chance.sample(photos, len(photos))
        for start in track(range(0, len(order), BATCH), f"detector {seed}, {epoch + 1}/{EPOCHS}", console=console):
            size = chance.choice(TRAINED_AT)
            batch = [view_of(photo, size, chance) for photo in order[start : start + BATCH]]
            batch = [(pixels, found) for pixels, found in batch if len(found.gt_instances)]
            if batch:
                images, samples = zip(*batch)
                loss = detector.loss(maps_of(torch.stack(images)).clone(), list(samples))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
                optimizer.step()
                total += float(loss.detach())
            schedule.step()
        console.print(f"detector {seed}, epoch {epoch + 1}: loss {total / steps:.4f}", highlight=False)
        kept = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict()}
        content = {**kept, "schedule": schedule.state_dict(), "epoch": epoch + 1}
        write_atomically(state, lambda unfinished: torch.save(content, unfinished))  # noqa: B023


def train_classes(classes: nn.Linear, photos: Sequence[Photo], maps_of: Callable[[Tensor], Tensor], seed: int) -> None:
    """Logistic regression on the mean features inside the boxes of random views; arguments as of ``train_detector``."""
    chance, x, labels = random.Random(f"{seed} classes"), [], []
    for photo in track(list(photos) * CLASS_VIEWS, f"features of boxes {seed}", console=console):
        image, found = view_of(photo, chance.choice(TRAINED_AT), chance)
        if len(found.gt_instances):
            x.append(mean_inside(maps_of(image[None]).clone(), [found.gt_instances.bboxes]))
            labels.append(found.gt_instances.labels)
    classes.load_state_dict(train_head(torch.cat(x), torch.cat(labels), classes.out_features).state_dict())


def mean_inside(maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Mean features in boxes per image (N, 4), all images' one after another (N, C), of the trunk's maps."""
    numbered = [torch.cat([part.new_full((len(part), 1), index), part], 1) for index, part in enumerate(boxes)]
    maps = maps.float().contiguous()  # mmcv reads memory as if it were
    return roi_align(maps, torch.cat(numbered), (3, 3), 1 / PATCH, 2).mean((2, 3))


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
        precision, by_class = _evaluate(COCOeval(coco, found, "bbox"), image_ids, draws, 1)
        # A box counts once, whatever classes it may be of.
        by_score = detections[detections[:, 5].argsort(kind="stable")[::-1]]
        once = by_score[np.sort(np.unique(by_score[:, :5], axis=0, return_index=True)[1])]
        of_any = COCOeval(coco, coco.loadRes(once), "bbox")
        of_any.params.useCats = 0
        precision_of_any, any_class = _evaluate(of_any, image_ids, draws, 2)
    person = categories.index(next(c["id"] for c in coco.dataset["categories"] if c["name"] == "person"))
    result = {name: _mean(precision[..., area]) for area, name in enumerate(("mAP", "small", "medium", "large"))}
    result |= {"person": _mean(precision[:, :, person, 0]), "any class": _mean(precision_of_any[..., 0])}
    result["any class, small"] = _mean(precision_of_any[..., 1])
    result["draws"] = [
        [_mean(of_all), _mean(of_all[:, :, person]), _mean(any_[..., 0]), _mean(any_[..., 1])]
        for of_all, any_ in zip(by_class, any_class)
    ]
    return result


def _evaluate(
    evaluation: COCOeval, image_ids: Sequence[int], draws: int, drawn_areas: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Precisions (thresholds, recalls, classes, areas) with the most detections, and the same of every sample of the
    images, of the first areas alone."""
    evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, count = evaluation.eval["precision"][..., -1], len(image_ids)
    resampled, chance = ResampledPrecision(evaluation, drawn_areas), random.Random(0)
    return precision, [resampled.of(chance.choices(range(count), k=count)) for _ in range(draws)]


def _mean(precision: np.ndarray) -> float:
    """In percent, over all that has objects."""
    return 100 * mean_precision(precision)


def all_settings(also: Sequence[str] = ()) -> list[Setting]:
    """Of everything; ``also`` are files of other learned scorers."""

    def tokens(share: float, size: tuple[int, int] = BASE) -> int:
        return round(share * Setting("dense", size).cells)

    dense = [Setting("dense", size) for size in sorted((*SMALLER, BASE, *OTHERS))]
    learned = [
        Setting("apt", size, "learned", tokens(share, size), fill=fill)
        for size, fill, shares in (
            (BASE, "interpolate", BUDGETS),
            (BASE, "learned", BUDGETS[:2]),
            *((size, "interpolate", BUDGETS) for size in OTHERS),
        )
        for share in shares
    ]
    pixel = [Setting("apt", BASE, scorer, tokens(0.6), fill="interpolate") for scorer in ("entropy", "upsample_mse")]
    others = [Setting(method, BASE, None, tokens(0.6)) for method in ("random", "tome")]
    others += [Setting("apt", BASE, file, tokens(0.6), fill="interpolate") for file in also]
    return dense + learned + pixel + others


def line_of(setting: Setting, quality: dict, ms: float) -> dict:
    """An entry of the results file."""
    point = {**setting.about, "tokens": round(quality["tokens"], 1), "split": "test", "ms": round(ms, 1)}
    return {**point, **{name: round(quality["AP"][0][name], 2) for name in KINDS}, "seed": SEED}


def gains(measured: dict[Setting, dict]) -> list[dict]:
    """AP over that of dense images with as many tokens; between two sizes the dense curve is a straight line.
    ``errors`` are standard deviations of the gains over samples of the test images."""

    dense = sorted((q for s, q in measured.items() if s.method == "dense"), key=lambda quality: quality["tokens"])

    def over_dense(quality: dict, *keys: str | int) -> float | None:
        value, *smaller = (reduce(getitem, keys, of["AP"][0]) for of in (quality, *dense))
        at = between(list(zip((of["tokens"] for of in dense), smaller)), quality["tokens"])
        return None if at is None else value - at

    entries = []
    for setting, quality in measured.items():
        if setting.method == "dense":
            continue
        entry = {**setting.about, "tokens": round(quality["tokens"], 1), "errors": None}
        for name in KINDS:
            gain = over_dense(quality, name)
            entry[name] = [round(quality["AP"][0][name], 2), None if gain is None else round(gain, 2)]
        if entry["mAP"][1] is not None:
            samples = range(len(quality["AP"][0]["draws"]))
            entry["errors"] = {
                name: round(statistics.stdev(over_dense(quality, "draws", sample, which) for sample in samples), 2)
                for which, name in enumerate(WITH_ERRORS)
            }
        entries.append(entry)
    return entries


def draw(path: Path, results: list[dict]) -> None:
    """AP on the test split against tokens; of all objects, and of small ones."""

    def name_of(line: dict) -> str:
        if line["method"] == "dense":
            return "dense, smaller images"
        maps = ", learned maps" if line["fill"] == "learned" else ""
        return f"{line['scorer'] or line['method']}{maps}, image of {line['image']}"

    titles = {
        "mAP": "all classes",
        "person": "persons",
        "any class": "objects of any class",
        "any class, small": "small objects of any class",
    }
    figure, panels = chart((19, 5), 4)
    for panel, key in zip(panels, titles):
        for name in dict.fromkeys(map(name_of, results)):
            lines = [line for line in results if name_of(line) == name]
            points = sorted((line["tokens"], line[key]) for line in lines)
            style = dict(color="black", linestyle="--") if "dense" in name else {}
            panel.plot(*zip(*points), label=name, marker="o", **style)
        panel.set(xlabel="tokens per image", title=titles[key])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="box AP on the test split")
    panels[0].legend(fontsize="small")
    figure.suptitle("COCO photographs, frozen DINOv2 ViT-S/14, simple feature pyramid with Faster R-CNN")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = study_parser(__doc__, "equal_tokens_boxes")
    parser.add_argument("images", type=Path, help="folder with (some of) the photographs")
    parser.add_argument("annotations", type=Path, help="COCO's instances_val2017.json")
    parser.add_argument("--out", type=Path, default=Path("docs/results/equal_tokens_coco.json"))
    args = parsed(parser)
    study = BoxStudy(args.images, args.annotations, args.weights, args.work_dir, getattr(torch, args.dtype))
    settings, results = all_settings(args.also), []
    measured = {setting: study.quality(setting) for setting in settings}
    times = study.times(settings)
    for setting, quality in measured.items():
        results.append(line_of(setting, quality, times[setting.name]))
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
