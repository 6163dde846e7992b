#!/usr/bin/env python
"""Show where an adaptive model's features differ from those of the dense model with the same weights.

examples:
  python tools/analyze_error.py data/photoshapes/images/validation --sample 4 --out-dir errors \\
      --config det_configs/eva02_tiny_apt_photoshapes.py \\
      --checkpoint det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors
  python tools/analyze_error.py photo.jpg --config seg_configs/eva02_l_apt_512.py --checkpoint iter_4000.pth

Per image: the patches, and a heat map of the error, the distance between both features of a cell over the root mean
square of the dense features. The table has the relative error of whole images, inside merged patches and in base
patches; padding is left out. A segmenter that slides is compared crop by crop. Runs without a GPU.
"""

import random
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from tools.cli import names_of, parser_of, run
from apt_backbones import PatchLayout
from apt_backbones.distance import FeatureDistance
from apt_backbones.images import find_images, read_rgb
from apt_backbones.selection import undo_normalization
from tools.drawing import compose, draw_grid, draw_heat, zoom_for
from tools.mm_model import Crops, MMModel

PANEL = 1000  # pixels near which the longer side of a drawn picture lies, if it is small


def pixels_of(model: MMModel, crops: Crops) -> Image.Image:
    """The image as the model sees it, without padding."""
    pixels = undo_normalization(crops.images, model.trunk.pixel_mean, model.trunk.pixel_std).clamp(0, 255)
    height, width = crops.size
    whole = torch.zeros(3, height, width)
    for crop, (top, left) in zip(pixels, crops.places):
        part = whole[:, top : top + crop.shape[1], left : left + crop.shape[2]]
        part.copy_(crop[:, : part.shape[1], : part.shape[2]])
    return Image.fromarray(whole.permute(1, 2, 0).byte().numpy())


def draw_patches(model: MMModel, image: Image.Image, crops: Crops, sides_BHW: Tensor, zoom: int) -> Image.Image:
    """The image with the patches of every crop."""
    canvas = image.resize((image.width * zoom, image.height * zoom))
    for sides_HW, (top, left) in zip(sides_BHW, crops.places):
        layout = PatchLayout.build(sides_HW[None], model.trunk.patch_size, tuple(model.trunk.thresholds))
        height, width = crops.images.shape[2:]
        part = image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))
        canvas.paste(draw_grid(part, layout, zoom), (left * zoom, top * zoom))
    return canvas


def heat_of(model: MMModel, crops: Crops, error: FeatureDistance) -> Tensor:
    """Relative error of every pixel's cell (height, width)."""
    height, width = crops.size
    whole, cell = torch.full((height, width), float("nan")), model.trunk.patch_size
    for heat_HW, (top, left) in zip(error.heat(), crops.places):
        part = whole[top : top + crops.images.shape[2], left : left + crops.images.shape[3]]
        pixels = heat_HW.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        part.copy_(pixels[: part.shape[0], : part.shape[1]])
    return whole


def analyze(model: MMModel, image: Image.Image) -> tuple[Image.Image, dict[str, float]]:
    """A sheet, and the tokens kept and relative errors: of the whole, inside merged patches, and in base patches."""
    crops = model.crops(image)
    error = model.error(crops)
    content, merged, base = crops.content_BHW, error.side_BHW > model.trunk.patch_size, model.trunk.patch_size
    tokens_BHW = (base / error.side_BHW.clamp(min=base)).square() * (error.side_BHW > 0)
    kept = tokens_BHW[content].mean()
    errors = {
        "kept": float(kept),
        "error": error.relative(content),
        "in merged patches": error.relative(content & merged),
        "in base patches": error.relative(content & (error.side_BHW == base)),
    }
    seen, heat = pixels_of(model, crops), heat_of(model, crops, error)
    zoom = zoom_for(seen, PANEL)
    highest = float(heat.max())
    picture = draw_heat(seen, heat, 1, zoom, (0.0, highest))
    panels = [
        (f"patches: {errors['kept']:.0%} of the tokens", draw_patches(model, seen, crops, error.side_BHW, zoom)),
        (f"feature error {errors['error']:.3f}; colours from 0 to {highest:.2f}", picture),
    ]
    return compose(panels), errors


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="IMAGE|DIR", help="image files, or folders to search for them")
    add("--config", required=True, help="adaptive detection or segmentation config")
    add("--checkpoint", required=True, metavar="FILE", help="its weights; dense ones, too (then merging is resizing)")
    add("--sample", type=int, default=20, metavar="N", help="use at most so many images (default: 20)")
    add("--seed", type=int, default=0, help="which images are sampled (default: 0)")
    add("--out-dir", type=Path, default=Path("."), help="folder for NAME_error.png (default: here)")
    args = parser.parse_args()
    paths = find_images(args.paths)
    if len(paths) > args.sample:
        paths = sorted(random.Random(args.seed).sample(paths, args.sample))
    warnings.simplefilter("ignore")  # of the toolboxes, about what this tool leaves out
    model = MMModel(args.config, args.checkpoint)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows, left_out, names = {}, [], names_of(paths)
    for path in track(paths, "comparing", console=Console(stderr=True), transient=True, disable=len(paths) == 1):
        try:
            picture, rows[path] = analyze(model, read_rgb(path))
        except (OSError, ValueError) as error:
            left_out.append(f"left out {path}: {error}")
            continue
        picture.save(args.out_dir / f"{names[path]}_error.png")
    for line in left_out:
        print(line, file=sys.stderr)
    if not rows:
        raise ValueError("no image could be compared")
    table = Table("image", *next(iter(rows.values())), title=f"relative feature error; pictures in {args.out_dir}")
    for path, errors in rows.items():
        table.add_row(path.name, f"{errors['kept']:.1%}", *(f"{value:.4f}" for value in list(errors.values())[1:]))
    mean = torch.tensor([list(errors.values()) for errors in rows.values()]).nanmean(0).tolist()
    table.add_section()
    table.add_row(f"mean of {len(rows)}", f"{mean[0]:.1%}", *(f"{value:.4f}" for value in mean[1:]))
    Console().print(table)


if __name__ == "__main__":
    run(main)
