#!/usr/bin/env python
"""Make PhotoShapes: textured shapes on real photographs, for detection, segmentation and question answering.

examples:
  python examples/make_photoshapes.py data/photoshapes --train 600 --val 120

The photographs are those in scikit-image's wheel; nothing is downloaded. Training scenes see only the left half of
every photograph and validation scenes the right half, as background and as texture. What is written:

    images/{training,validation}/000001.jpg           the longest side is --size; 4:3, 3:2, square and portrait
    annotations/instances_{training,validation}.json  COCO boxes and RLE masks of the visible pixels, plus "colour"
    annotations/{training,validation}/000001.png      ADE20K: 0 unlabelled (never used here), 1 background, 2.. shapes
    vqa_{training,validation}.json                    LLaVA's conversations, plus "question_type"
"""

import colorsys
import functools
import importlib.util
import itertools
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tools.cli import parser_of, run
from examples.new_folder import new_folder

SPLITS = ("training", "validation")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
HUES = {"red": 0.0, "yellow": 0.15, "green": 0.34, "cyan": 0.5, "blue": 0.64, "purple": 0.8}
PHOTOS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg"),
    *("camera.png", "moon.png", "clock_motion.png", "coins.png", "brick.png", "grass.png", "gravel.png"),
    *("page.png", "text.png"),
)
PATTERNS = ("plain", "gradient", "stripes", "checker", "noise", "photo")
ASPECTS = (4 / 3, 3 / 2, 1.0, 3 / 4)
MAX_OBJECTS = 6
MAX_COUNT = 5  # a scene of six is never asked for its total, so that "6" is no answer
MIN_VISIBLE = 0.4  # of an object's area; whatever would hide more is not pasted
MIN_CONTRAST = 80  # distance of mean RGB (0..255) between an object and what surrounds it
MIN_DIAMETER = 24 / 512  # of the smallest object, as a share of the image's longest side
MIN_PIXELS = 150  # that an object shows at least, in images of 512 px

QUESTION_TYPES = {
    "Is there a {shape}?": "yes/no",
    "Is there a {colour} {shape}?": "yes/no",
    "How many objects are there?": "count",
    "How many {plural} are there?": "count",
    "What shape is the {colour} object?": "shape",
    "What colour is the {shape}?": "colour",
    "Is the {thing} in the left or right half?": "position",
    "Is the {thing} in the top or bottom half?": "position",
    "Is the {thing} left or right of the {other}?": "position",
    "Is the {thing} above or below the {other}?": "position",
}
QUESTIONS_PER_TYPE = 2  # per image, at most: balancing the answers takes some away


# ------------------------------------------------------------------------------------------- photographs


@functools.cache
def photo_half(name, split):
    """The half of a bundled photograph that belongs to a split: float32 (H, W, 3) in 0..255."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise ImportError("PhotoShapes needs the photographs in scikit-image: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall scikit-image")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    left, right = source_columns(pixels.shape[1], split)
    return pixels[:, left:right]


def source_columns(width, split):
    """Columns [left, right) of a photograph that a split may use; the two splits share none."""
    return (0, width // 2) if split == "training" else (width // 2, width)


def photo_crop(rng, split, width, height):
    """A random part of a random photograph, enlarged to (height, width, 3); mirrored half of the time."""
    photo = photo_half(PHOTOS[rng.integers(len(PHOTOS))], split)
    scale = min(photo.shape[1] / width, photo.shape[0] / height) * rng.uniform(0.6, 1)
    w, h = scale * width, scale * height
    x, y = rng.uniform(0, photo.shape[1] - w), rng.uniform(0, photo.shape[0] - h)
    pixels = Image.fromarray(photo.astype(np.uint8))
    crop = np.asarray(pixels.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h)), np.float32)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


# ------------------------------------------------------------------------------------------- backgrounds


def background(rng, split, width, height):
    """A photograph out of focus on one side, often with a smooth sky or floor: float32 (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    photo = photo_crop(rng, split, width, height)
    photo = photo.mean() + (photo - photo.mean()) * rng.uniform(0.6, 1) + rng.uniform(-20, 20, 3)
    # Film grain makes up for the detail that an enlarged crop lacks.
    photo = (photo + rng.normal(0, rng.uniform(0, 4), (height, width, 1))).clip(0, 255)

    radius = max(width, height) * rng.uniform(0.006, 0.03)
    blurred = Image.fromarray(photo.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    angle = rng.uniform(0, 2 * math.pi)
    across = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
    focus = ((across - rng.uniform(-0.5, 0.2)) / 0.2 + 0.5).clip(0, 1)[..., None]
    canvas = focus * photo + (1 - focus) * np.asarray(blurred, np.float32)

    if rng.random() < 0.5:
        wave = rng.uniform(0, 0.04) * np.sin(x / width * rng.uniform(3, 12) + rng.uniform(0, 6))
        depth = y / height if rng.random() < 0.7 else 1 - y / height
        edge = rng.uniform(0.25, 0.65)
        inside = ((edge + wave - depth) * height / 3).clip(0, 1)[..., None]
        top = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.3, 0.95)))
        bottom = top + rng.uniform(-40, 40)
        sky = top + (bottom - top) * (depth / edge)[..., None]
        canvas = inside * sky + (1 - inside) * canvas
    return canvas.clip(0, 255).astype(np.float32)


# ------------------------------------------------------------------------------------------- objects


def outline(shape):
    """Corners of a shape inside the unit circle, as complex numbers (N,); a ring's are those of its outer edge."""
    if shape == "cross":
        return np.concatenate([np.array([0.32 + 0.94j, 0.32 + 0.32j, 0.94 + 0.32j]) * (-1j) ** k for k in range(4)])
    corners = {"square": 4, "triangle": 3, "star": 10}.get(shape, 64)
    radii = np.where(np.arange(corners) % 2, 0.42, 1) if shape == "star" else 1
    return radii * np.exp(2j * math.pi * np.arange(corners) / corners)


def stencil(rng, shape, diameter):
    """Anti-aliased coverage of a rotated, slightly stretched shape: float32 (side, side) in 0..1."""
    side, oversampling = math.ceil(diameter) + 2, 4
    corners = outline(shape)
    corners = (corners.real + 1j * corners.imag * rng.uniform(0.8, 1)) * np.exp(2j * math.pi * rng.random())
    drawing = Image.new("L", (side * oversampling, side * oversampling))
    for scale, value in ((1, 255), (0.55, 0)) if shape == "ring" else ((1, 255),):
        points = oversampling / 2 * (side + scale * diameter * np.stack([corners.real, corners.imag], axis=1))
        ImageDraw.Draw(drawing).polygon(points.ravel().tolist(), fill=value)
    return np.asarray(drawing.reduce(oversampling), np.float32) / 255


def pattern(rng, split, side):
    """Grey texture of a random kind: float (side, side) in 0..1."""
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    if kind == "plain":
        return np.full((side, side), rng.uniform(0.4, 1))
    if kind == "photo":
        grey = photo_crop(rng, split, side, side).mean(axis=2)
        return (grey - grey.min()) / max(1, np.ptp(grey))
    if kind == "noise":
        grain = rng.integers(1, 5)
        coarse = rng.random((side // grain + 1, side // grain + 1))
        return coarse.repeat(grain, axis=0).repeat(grain, axis=1)[:side, :side]
    angle, period = rng.uniform(0, math.pi), max(6, side * rng.uniform(0.12, 0.3))
    y, x = np.mgrid[:side, :side]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "gradient":
        return (u - u.min()) / np.ptp(u)
    stripes, crossing = np.sin(2 * math.pi * u / period), np.sin(2 * math.pi * v / period)
    return (0.5 + 2 * (stripes if kind == "stripes" else 3 * stripes * crossing)).clip(0, 1)


def fill(rng, split, side):
    """Texture of an object and the name of its colour, None for greys: (float (side, side, 3) in 0..255, name)."""
    grey = pattern(rng, split, side)[..., None]
    if rng.random() < 0.2:
        dark, bright = ((0, 90), (165, 255))[rng.integers(2)]
        return np.broadcast_to(dark + (bright - dark) * grey, (side, side, 3)), None
    name = list(HUES)[rng.integers(len(HUES))]
    hue, saturation = HUES[name] + rng.uniform(-0.02, 0.02), rng.uniform(0.8, 1)
    dark, bright = (np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)) for value in (0.5, 1))
    return 255 * (dark + (bright - dark) * grey), name


def contrast(canvas, texture, alpha):
    """Distance of an object's mean colour from that of what is around it in its box."""
    around = alpha < 0.1
    inside = np.average(texture.reshape(-1, 3), axis=0, weights=alpha.ravel())
    return np.linalg.norm(inside - canvas[around].mean(axis=0)) if around.any() else 0.0


def compose(rng, split, size, min_diameter=MIN_DIAMETER):
    """One scene: uint8 image (H, W, 3), int owner map (H, W) and the objects' (shape, colour).

    The owner map holds 0 for background and i + 1 for the pixels in which object i is visible.
    """
    aspect = ASPECTS[rng.integers(len(ASPECTS))]
    width, height = round(size * min(1, aspect)), round(size / max(1, aspect))
    canvas = background(rng, split, width, height)
    owner = np.zeros((height, width), np.int64)
    objects, areas = [], []

    # Few kinds in one scene now and then, so that high counts of one shape occur.
    kinds = rng.permutation(len(SHAPES))[: rng.choice([1, 2, 3, len(SHAPES)])]
    wanted = rng.integers(1, MAX_OBJECTS + 1)
    smallest, largest = min_diameter * size, min(width, height) / 2
    for _ in range(20 * wanted):
        if len(objects) == wanted:
            break
        shape = SHAPES[rng.choice(kinds)]
        alpha = stencil(rng, shape, smallest * (largest / smallest) ** rng.beta(1.6, 1))
        full, side = np.count_nonzero(alpha >= 0.5), len(alpha)
        # Up to a fifth of an object's box may stick out of the image.
        x = round(rng.uniform(-0.2 * side, width - 0.8 * side))
        y = round(rng.uniform(-0.2 * side, height - 0.8 * side))
        rows, columns = slice(max(0, y), y + side), slice(max(0, x), x + side)
        texture, colour = fill(rng, split, side)
        cut = (slice(max(0, -y), height - y), slice(max(0, -x), width - x))
        alpha, texture = alpha[cut], texture[cut]

        after = owner.copy()
        after[rows, columns][alpha >= 0.5] = len(objects) + 1
        visible = np.bincount(after.ravel(), minlength=len(objects) + 2)[1:]
        needed = np.maximum(MIN_VISIBLE * np.array([*areas, full]), MIN_PIXELS * (size / 512) ** 2)
        if (visible < needed).any() or contrast(canvas[rows, columns], texture, alpha) < MIN_CONTRAST:
            continue
        canvas[rows, columns] += alpha[..., None] * (texture - canvas[rows, columns])
        owner = after
        objects.append((shape, colour))
        areas.append(full)
    return canvas.round().astype(np.uint8), owner, objects


# ------------------------------------------------------------------------------------------- annotations


def write_scene(folder, split, index, seed, size, min_diameter):
    """Write one scene's image and class mask; returns its COCO image record and annotations (without ids)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image, owner, objects = compose(rng, split, size, min_diameter)
    while not objects:
        image, owner, objects = compose(rng, split, size, min_diameter)
    name = f"{index:06d}"
    Image.fromarray(image).save(folder / "images" / split / f"{name}.jpg", quality=95)
    classes = np.array([1] + [SHAPES.index(shape) + 2 for shape, _ in objects], np.uint8)
    Image.fromarray(classes[owner]).save(folder / "annotations" / split / f"{name}.png")

    annotations = []
    for i, (shape, colour) in enumerate(objects):
        rle = coco_mask.encode(np.asfortranarray(owner == i + 1, dtype=np.uint8))
        annotations.append(
            {
                "image_id": index,
                "category_id": SHAPES.index(shape) + 1,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": int(coco_mask.area(rle)),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                "iscrowd": 0,
                "colour": colour,
            }
        )
    height, width = owner.shape
    return {"id": index, "file_name": f"{name}.jpg", "height": height, "width": width}, annotations


def ask(annotations, width, height):
    """Every question that a scene answers without doubt: yields (template, slots, answer)."""
    objects = [{"shape": SHAPES[a["category_id"] - 1], "colour": a["colour"], "bbox": a["bbox"]} for a in annotations]
    colours = Counter(o["colour"] for o in objects)
    if len(objects) <= MAX_COUNT:
        yield "How many objects are there?", {}, str(len(objects))
    for shape in SHAPES:
        same = [o for o in objects if o["shape"] == shape]
        yield "Is there a {shape}?", {"shape": shape}, "yes" if same else "no"
        if len(same) <= MAX_COUNT:
            plural = shape + ("es" if shape.endswith("s") else "s")
            yield "How many {plural} are there?", {"plural": plural}, str(len(same))
        if all(o["colour"] for o in same):
            for colour in HUES:
                # A shape or a colour that occurs, or the "no" would be too easy.
                if same or colours[colour]:
                    answer = "yes" if any(o["colour"] == colour for o in same) else "no"
                    yield "Is there a {colour} {shape}?", {"colour": colour, "shape": shape}, answer
        if len(same) == 1 and same[0]["colour"]:
            yield "What colour is the {shape}?", {"shape": shape}, same[0]["colour"]
    for o in objects:
        if o["colour"] and colours[o["colour"]] == 1:
            yield "What shape is the {colour} object?", {"colour": o["colour"]}, o["shape"]

    yield from ask_positions(objects, width, height)


def ask_positions(objects, width, height):
    """Questions about where an object is, of those that have a name of their own; near the middle none is asked."""
    shapes = Counter(o["shape"] for o in objects)
    pairs = Counter((o["colour"], o["shape"]) for o in objects)
    centres = {}
    for o in objects:
        if shapes[o["shape"]] == 1:
            name = o["shape"]
        elif o["colour"] and pairs[o["colour"], o["shape"]] == 1:
            name = f"{o['colour']} {o['shape']}"
        else:
            continue
        x, y, w, h = o["bbox"]
        centres[name] = (x + w / 2) / width, (y + h / 2) / height
    for thing, (x, y) in centres.items():
        if abs(x - 0.5) > 0.1:
            yield "Is the {thing} in the left or right half?", {"thing": thing}, "left" if x < 0.5 else "right"
        if abs(y - 0.5) > 0.1:
            yield "Is the {thing} in the top or bottom half?", {"thing": thing}, "top" if y < 0.5 else "bottom"
    # Pairs go by shape alone: with colours nearly every question would be new, and easily learned by heart.
    for thing, other in itertools.permutations([name for name in centres if name in SHAPES], 2):
        slots = {"thing": thing, "other": other}
        right, down = np.subtract(centres[thing], centres[other])
        if abs(right) > 0.15:
            yield "Is the {thing} left or right of the {other}?", slots, "left" if right < 0 else "right"
        if abs(down) > 0.15:
            yield "Is the {thing} above or below the {other}?", slots, "above" if down < 0 else "below"


def balanced_questions(images, annotations, split, seed):
    """LLaVA records; within a template no answer is more frequent than the median one: of yes and no, equally many."""
    per_image = defaultdict(list)
    for annotation in annotations:
        per_image[annotation["image_id"]].append(annotation)
    pool = defaultdict(lambda: defaultdict(list))
    for image in images:
        for template, slots, answer in ask(per_image[image["id"]], image["width"], image["height"]):
            pool[template][answer].append((image["id"], template.format(**slots)))

    rng = np.random.default_rng([seed, SPLITS.index(split), 0])
    families = Counter(QUESTION_TYPES.values())
    chosen = []
    for template, kind in QUESTION_TYPES.items():
        answers = pool[template]
        if not answers:
            continue
        quota = QUESTIONS_PER_TYPE * len(images) / families[kind] / len(answers)
        limit = math.ceil(min(quota, statistics.median_low(map(len, answers.values()))))
        for answer, questions in sorted(answers.items()):
            # Every image has its turn before any has a second one.
            turns = defaultdict(itertools.count)
            shuffled = [questions[i] for i in rng.permutation(len(questions))]
            for question in sorted(shuffled, key=lambda question: next(turns[question[0]]))[:limit]:
                chosen.append((*question, answer, kind))
    return [
        {
            "id": f"{split}-{n:06d}",
            "image": f"images/{split}/{image:06d}.jpg",
            "question_type": kind,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for n, (image, question, answer, kind) in enumerate(sorted(chosen))
    ]


# ------------------------------------------------------------------------------------------- the data set


def for_each(items, function, workers, title):
    """List of function(item), in order, with a progress bar; an error or Ctrl-C drops what has not begun."""
    bar = functools.partial(track, description=title, total=len(items), console=Console(stderr=True))
    if workers == 1:
        return list(bar(map(function, items)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), follow, (os.getpid(),))
    try:
        # An interrupt while items are handed out would leave the pool's locks closed.
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        results = pool.map(function, items)
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        return list(bar(results))
    finally:
        pool.shutdown(cancel_futures=True)


def follow(parent):
    """In a worker: leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_photoshapes(destination, train=600, val=120, size=512, min_diameter=MIN_DIAMETER, seed=0, workers=1):
    """Write the data set into a new folder; the same arguments give the same bytes, whatever ``workers`` is.

    Args:
        destination: folder to make; it must not exist, or be empty. It appears only when everything is written.
        train, val: number of training and of validation images.
        size: longest side of every image, pixels.
        min_diameter: of the smallest object, as a share of ``size``; the largest is half of an image's shorter side.
        seed: any integer >= 0.
        workers: processes that draw scenes.

    Returns:
        dict: split -> (COCO dictionary, list of LLaVA records), as written.

    Raises:
        FileExistsError: the destination holds something.
        ImportError, FileNotFoundError: scikit-image or one of its photographs is missing.
        ValueError: a number that is too small or too large.
    """
    limits = {"train": (train, 1), "val": (val, 1), "size": (size, 64), "seed": (seed, 0), "workers": (workers, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if not 0 < min_diameter <= 0.3:
        raise ValueError(f"min_diameter is {min_diameter}; it must be above 0 and at most 0.3")
    destination = Path(destination)
    made = {}
    with new_folder(destination) as folder:
        for name in PHOTOS:
            photo_half(name, "training")
        for split, count in zip(SPLITS, (train, val)):
            for kind in ("images", "annotations"):
                (folder / kind / split).mkdir(parents=True)
            draw = functools.partial(write_scene, folder, split, seed=seed, size=size, min_diameter=min_diameter)
            scenes = for_each(range(1, count + 1), draw, workers, title=split)
            images = [image for image, _ in scenes]
            annotations = [annotation for _, found in scenes for annotation in found]
            coco = {
                "info": {"description": "PhotoShapes", "seed": seed},
                "categories": [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)],
                "images": images,
                "annotations": [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)],
            }
            questions = balanced_questions(images, annotations, split, seed)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
            (folder / f"vqa_{split}.json").write_text(json.dumps(questions, indent=1))
            made[split] = coco, questions
    return made


def main():
    parser = parser_of(__doc__)
    parser.add_argument("destination", metavar="DST", help="folder to make; must not exist, or be empty")
    parser.add_argument("--train", type=int, default=600, metavar="N", help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=120, metavar="N", help="validation images (default %(default)s)")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="longest side (default %(default)s)")
    parser.add_argument(
        "--min-diameter",
        type=float,
        default=MIN_DIAMETER,
        metavar="SHARE",
        help="diameter of the smallest object, as a share of the longest side (default %(default).3f)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = make_photoshapes(**vars(args))
    except KeyboardInterrupt:
        sys.exit(f"interrupted; nothing is left in {args.destination}")

    table = Table(str(args.destination), *made)
    table.add_row("images", *(str(len(coco["images"])) for coco, _ in made.values()))
    for i, shape in enumerate(SHAPES):
        found = (sum(a["category_id"] == i + 1 for a in coco["annotations"]) for coco, _ in made.values())
        table.add_row(f"{shape} objects", *map(str, found))
    for kind in dict.fromkeys(QUESTION_TYPES.values()):
        asked = (sum(q["question_type"] == kind for q in questions) for _, questions in made.values())
        table.add_row(f"{kind} questions", *map(str, asked))
    Console().print(table)


if __name__ == "__main__":
    run(main)
