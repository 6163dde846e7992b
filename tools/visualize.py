#!/usr/bin/env python
"""Draw which patches an image gets.

examples:
  python tools/visualize.py photo.jpg
  python tools/visualize.py photos/ --resize 1536 --thresholds 32:5.5 64:5 128:4 --out-dir pictures
  python tools/visualize.py photo.jpg --patch-size 14 --resize 336 --thresholds 28:5.75 --show both
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from apt_backbones import PatchLayout, score_patches, select_patches
from apt_backbones.images import find_images, read_rgb, to_tensor
from apt_backbones.scores import SCORERS, check_thresholds

# Okabe and Ito's colours, told apart with any colour vision; the base patch, then each size above it.
COLOURS = ((255, 255, 255), (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115), (213, 94, 0))
PANEL_SIDE = 1000  # pixels that the longer side of a drawn image has at least


def parse_thresholds(items: list[str], patch_size: int) -> dict[int, float]:
    """["32:5.5", "64:5"] -> {32: 5.5, 64: 5.0}."""
    try:
        thresholds = {int(size): float(threshold) for size, threshold in (item.split(":") for item in items)}
    except ValueError:
        raise ValueError(f"thresholds must be SIZE:THRESHOLD, e.g. 32:5.5 64:5; got {' '.join(items)}") from None
    return check_thresholds(thresholds, patch_size)


def draw_grid(image: Image.Image, layout: PatchLayout) -> Image.Image:
    """The image with every patch outlined in its size's colour; larger patches are tinted a little."""
    zoom = max(1, round(PANEL_SIDE / max(image.size)))
    canvas = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.LANCZOS).convert("RGBA")
    lines = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(lines)
    cell = layout.patch_size * zoom
    width = max(1, round(max(canvas.size) / 1000))
    for side, colour in zip(layout.sizes, COLOURS):
        base = side == layout.patch_size
        tint, outline = (*colour, 0 if base else 70), (*colour, 80 if base else 230)
        for token in layout.sizes[side].tolist():
            x, y = int(layout.column_T[token]) * cell, int(layout.row_T[token]) * cell
            corners = (x, y, x + side * zoom, y + side * zoom)
            draw.rectangle(corners, fill=tint, outline=outline, width=width)
    return Image.alpha_composite(canvas, lines).convert("RGB")


def draw_scores(image: Image.Image, scores: torch.Tensor) -> Image.Image:
    """The image in grey under a heat map of one size's scores (1, h, w); overhanging patches stay grey."""
    from matplotlib import colormaps

    zoom = max(1, round(PANEL_SIDE / max(image.size)))
    size = (image.width * zoom, image.height * zoom)
    values = scores[0].numpy()
    inside = np.isfinite(values)
    low, high = (values[inside].min(), values[inside].max()) if inside.any() else (0, 1)
    heat = colormaps["viridis"]((values - low) / max(high - low, 1e-9))
    heat[..., 3] = np.where(inside, 0.65, 0)
    heat = Image.fromarray((heat * 255).astype(np.uint8), "RGBA").resize(size, Image.Resampling.NEAREST)
    return Image.alpha_composite(image.convert("L").resize(size).convert("RGBA"), heat).convert("RGB")


def compose(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Panels beside each other, each with a caption below."""
    gap, font_size = 16, max(14, panels[0][1].width // 36)
    font = ImageFont.load_default(font_size)
    while font_size > 8 and any(font.getlength(caption) > panel.width for caption, panel in panels):
        font_size -= 1
        font = ImageFont.load_default(font_size)
    width = sum(panel.width for _, panel in panels) + gap * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0][1].height + 3 * gap + font_size), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for caption, panel in panels:
        sheet.paste(panel, (x, gap))
        draw.text((x, panel.height + int(1.6 * gap)), caption, fill="black", font=font)
        x += panel.width + gap
    return sheet


def visualize(image: Image.Image, patch_size: int, thresholds: dict[int, float], scorer: str, show: str) -> Image.Image:
    """One sheet: the standard grid beside the chosen patches, heat maps of the scores, or both."""
    tensor = to_tensor(image)
    sizes = tuple(thresholds)
    scores = score_patches(tensor, sizes, scorer)
    sides = select_patches(scores, thresholds, patch_size, tensor.shape[2:])
    chosen = PatchLayout.build(sides, patch_size, sizes)
    standard = PatchLayout.build(torch.full_like(sides, patch_size), patch_size)
    panels = []
    if show in ("grid", "both"):
        saved = 1 - chosen.num_tokens / standard.num_tokens
        counts = ", ".join(f"{len(index)} x {size} px" for size, index in chosen.sizes.items())
        panels.append((f"standard: {standard.num_tokens} tokens", draw_grid(image, standard)))
        panels.append((f"adaptive: {chosen.num_tokens} tokens, {saved:.0%} fewer: {counts}", draw_grid(image, chosen)))
    if show in ("scores", "both"):
        for size in sizes:
            inside = scores[size][scores[size].isfinite()]
            span = f", {inside.min():.2f} to {inside.max():.2f}" if len(inside) else ""
            caption = f"{scorer} at {size} px{span} (threshold {thresholds[size]:g})"
            panels.append((caption, draw_scores(image, scores[size])))
    return compose(panels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="IMAGE|DIR", help="image files, or folders to search for them")
    parser.add_argument("--patch-size", type=int, default=16, help="side of the base patch in pixels (default: 16)")
    parser.add_argument(
        "--thresholds",
        nargs="+",
        metavar="SIZE:THRESHOLD",
        help="merge patches of SIZE pixels that score below THRESHOLD (default: 5.5 at twice, 4 at 4 times the base)",
    )
    parser.add_argument("--scorer", choices=SCORERS, default="entropy", help="default: entropy, in bits")
    parser.add_argument("--show", choices=("grid", "scores", "both"), default="grid", help="default: grid")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="resize the longer side first, as a model would")
    parser.add_argument("--out-dir", type=Path, default=Path("."), help="folder for NAME_patches.png (default: here)")
    args = parser.parse_args()
    default = [f"{2 * args.patch_size}:5.5", f"{4 * args.patch_size}:4"]
    try:
        thresholds = parse_thresholds(args.thresholds or default, args.patch_size)
        paths = find_images(args.paths)
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for path in track(paths, description="drawing", disable=len(paths) == 1):
            image = read_rgb(path)
            if args.resize:
                scale = args.resize / max(image.size)
                image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
            target = args.out_dir / f"{path.stem}_patches.png"
            visualize(image, args.patch_size, thresholds, args.scorer, args.show).save(target)
            print(target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
