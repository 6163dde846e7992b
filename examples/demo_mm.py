"""What the demo shows of detection and segmentation: validation images through the dense model and through APT."""

import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from PIL import Image

from apt_backbones.images import read_rgb
from apt_backbones.selection import layout_of, patch_sides
from examples import demo_pictures
from examples.demo_page import data_uri
from examples.demo_pictures import class_legend, detections, label_map, patch_legend, patches, spread
from examples.photoshapes_results import AFTER, DENSE, Experiment, Row
from tools import drawing
from tools.mm_runs import TIMED_IMAGES, TIMED_ROUNDS, quiet, scorer_of
from tools.steps import fingerprint

SURE = 0.5  # score from which on a detection is drawn


NEXT = {
    "det": """\
python tools/convert_checkpoint.py eva02-det eva02_L_coco_sys.pth checkpoints/eva02_l_det_1536.safetensors
python tools/calibrate.py --images data/coco/val2017 --config det_configs/eva02_l_apt_1536.py --keep 0.7
python tools/train.py det_configs/eva02_l_apt_1536.py
python tools/test.py det_configs/eva02_l_apt_1536.py work_dirs/det/eva02_l_apt_1536/iter_3000.pth
python tools/benchmark.py det_configs/eva02_l_apt_1536.py --keep 0.7""",
    "seg": """\
python tools/convert_checkpoint.py eva02-seg eva02_L_ade_seg_upernet_sz512.pth checkpoints/eva02_l_seg_512.pth
python tools/calibrate.py --config seg_configs/eva02_l_apt_512.py --keep 0.7 \\
    --images data/ade/ADEChallengeData2016/images
python tools/train.py seg_configs/eva02_l_apt_512.py
python tools/test.py seg_configs/eva02_l_apt_512.py work_dirs/seg/eva02_l_apt_512/iter_4000.pth
python tools/benchmark.py seg_configs/eva02_l_apt_512.py --keep 0.7""",
}


def speed_text(experiment: Experiment) -> str:
    num_timed = min(TIMED_IMAGES, len(experiment.calibration["shares"]))
    text = (
        f"Whole model, one image at a time, without loading. {num_timed} images, which keep as many tokens as all do, "
        f"go through all methods, interleaved, {TIMED_ROUNDS} times; of every image the median counts."
    )
    if experiment.has_rectangles:
        text += " Padding images to a square costs tokens, too; two lines of the table do without."
    return text


def show(experiment: Experiment, count: int) -> dict:
    """``pictures`` of some validation images from those that keep few tokens to those that keep many, and a
    ``legends`` to them; finished pictures are kept as every step is."""
    rows = [next(row for row in experiment.rows if row.title == title) for title in (DENSE, AFTER)]
    code = [Path(module.__file__) for module in (sys.modules[__name__], demo_pictures, drawing)]
    inputs = {row.title: experiment.inputs(row) for row in rows} | {"count": count, "drawn by": fingerprint(*code)}
    title = f"pictures of {count} images"
    return experiment.steps.run("pictures", title, inputs, lambda: draw(experiment, rows, count))


@quiet()
@torch.no_grad()
def draw(experiment: Experiment, rows: list[Row], count: int) -> dict:
    dense, apt = (experiment.loaded(row) for row in rows)
    dataset, backbone = dense.test_dataloader.dataset, apt.cfg.model.backbone
    classes, sizes = dataset.metainfo["classes"], (backbone.patch_size, *sorted(backbone.thresholds))
    pictures = []
    for index in spread(experiment.calibration["shares"], count):
        sample = dataset[index]
        truth = sample["data_samples"]
        pixels = sample["inputs"].flip(0)  # BGR to RGB
        seen = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        settings = dict(backbone.thresholds), backbone.patch_size
        layout = layout_of(patch_sides(pixels[None].float(), *settings, scorer_of(apt.cfg)), *settings)
        found = [runner.model.test_step({k: [v] for k, v in sample.items()})[0] for runner in (dense, apt)]
        image = read_rgb(truth.img_path)
        compare = compare_labels if "pred_sem_seg" in found[0] else compare_detections
        caption, panels = compare(image, truth, *found, classes)
        panels = [{"label": label, "uri": data_uri(panel)} for label, panel in (patches(seen, layout), *panels)]
        pictures.append({"caption": caption, "panels": panels, "answers": []})
    return {"pictures": pictures, "legends": [patch_legend(sizes), class_legend(classes)]}


def compare_detections(image, truth, dense, apt, classes) -> tuple[str, list[tuple[str, Image.Image]]]:
    """A caption and pictures of what both models are sure of."""
    panels = []
    for title, sample in (("dense", dense), ("APT", apt)):
        found = sample.pred_instances.cpu()
        found = found[found.scores >= SURE]
        names = [f"{classes[label]} {score:.2f}" for label, score in zip(found.labels.tolist(), found.scores.tolist())]
        masks = np.asarray(found.masks, dtype=bool)
        panel = detections(image, found.bboxes.numpy(), found.labels.numpy(), masks, names)
        panels.append((f"{title}: {objects(len(found))}", panel))
    there = len(truth.gt_instances)
    return f"An image of {objects(there)}. Boxes are drawn from a score of {SURE} on.", panels


def objects(count: int) -> str:
    return f"{count} object{'s' * (count != 1)}"


def compare_labels(image, truth, dense, apt, classes) -> tuple[str, list[tuple[str, Image.Image]]]:
    """A caption and pictures of the truth and of both models' label maps."""
    maps = [pixels_of(truth.gt_sem_seg), pixels_of(dense.pred_sem_seg), pixels_of(apt.pred_sem_seg)]
    right = [(labels == maps[0]).mean() for labels in maps]
    titles = ("truth", f"dense: {right[1]:.1%} of the pixels right", f"APT: {right[2]:.1%} of the pixels right")
    caption = f"Dense and APT agree on {(maps[1] == maps[2]).mean():.1%} of the pixels."
    return caption, [(title, label_map(image, labels, classes)) for title, labels in zip(titles, maps)]


def pixels_of(labels: BaseDataElement) -> np.ndarray:
    return labels.data[0].cpu().numpy()
