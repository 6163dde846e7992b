"""The demo's pictures: chosen patches, detections, and label maps, drawn for people to compare."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apt_backbones import PatchLayout
from tools.drawing import COLORS, draw_grid, zoom_for

# Okabe and Ito's, told apart with any color vision.
CLASS_COLORS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    (120, 120, 120),
)
WIDTH = 640  # pixels of the longer side of a drawn picture
BACKGROUND = "background"


def spread(values: Sequence[float], count: int) -> list[int]:
    """Positions of so many values, evenly spaced by rank from a low one to a high one."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    return [order[int((i + 0.5) / count * len(order))] for i in range(min(count, len(order)))]


def color_of(index: int) -> tuple[int, int, int]:
    return CLASS_COLORS[index % len(CLASS_COLORS)]


def css(color: tuple[int, int, int]) -> str:
    return f"rgb({' '.join(map(str, color))})"


def class_legend(classes: Sequence[str]) -> dict:
    """The page's legend of all classes but the background."""
    shown = [(name, color_of(index)) for index, name in enumerate(classes) if name != BACKGROUND]
    return {"title": "objects", "entries": [{"label": name, "color": css(color)} for name, color in shown]}


def patch_legend(sizes: Sequence[int]) -> dict:
    """The page's legend of patch sizes in pixels, the base patch first."""
    entries = [{"label": f"{size} px", "color": css(color)} for size, color in zip(sizes, COLORS)]
    return {"title": "patches", "entries": entries}


def patches(image: Image.Image, layout: PatchLayout) -> tuple[str, Image.Image]:
    """A caption, and an image as the model sees it with its patches; the layout's batch is this image alone."""
    share = layout.num_tokens / (layout.grid[0] * layout.grid[1])
    caption = f"patches: {layout.num_tokens} tokens, {share:.0%} of the dense model's"
    return caption, draw_grid(image, layout, zoom_for(image, 1.5 * WIDTH))


def enlarged(image: Image.Image) -> tuple[Image.Image, float]:
    """The image with its longer side as long as pictures are, and by how much it grew."""
    scale = WIDTH / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS), scale


def detections(
    image: Image.Image, boxes_N4: np.ndarray, labels_N: np.ndarray, masks_NHW: np.ndarray, names: Sequence[str]
) -> Image.Image:
    """An image with tinted masks, boxes (x1, y1, x2, y2 in the image's pixels) and a name for each object, the surest
    first."""
    canvas, scale = enlarged(tinted(image, [(mask, color_of(label)) for mask, label in zip(masks_NHW, labels_N)]))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(WIDTH // 28)
    for box, label, name in reversed(list(zip(boxes_N4 * scale, labels_N, names))):  # the surest on top
        color = color_of(label)
        draw.rectangle(box.tolist(), outline=color, width=4)
        *_, right, bottom = draw.textbbox((0, 0), name, font=font)
        x = min(max(0, float(box[0])), canvas.width - right - 6)
        y = max(0, float(box[1]) - bottom - 6)
        draw.rectangle((x, y, x + right + 6, y + bottom + 6), fill=color)
        draw.text((x + 3, y + 2), name, fill="white" if sum(color) < 330 else "black", font=font)
    return canvas


def label_map(image: Image.Image, labels_HW: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """An image tinted by the class of each pixel; the background is not."""
    tints = [(labels_HW == i, color_of(i)) for i, name in enumerate(classes) if name != BACKGROUND]
    return enlarged(tinted(image, tints))[0]


def tinted(image: Image.Image, tints: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> Image.Image:
    """An image with colors laid over the pixels of masks (H, W)."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    for mask, color in tints:
        pixels[mask] = 0.4 * pixels[mask] + 0.6 * np.array(color, np.float32)
    return Image.fromarray(pixels.round().astype(np.uint8))
