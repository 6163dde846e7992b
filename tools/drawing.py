"""Pictures of patch layouts, scores and errors, and sheets of several pictures with captions."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from apt_backbones import PatchLayout

# Okabe and Ito's colors, told apart with any color vision; the base patch, then each size above it.
COLORS = ((255, 255, 255), (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115), (213, 94, 0))
GAP = 16  # pixels between pictures of a sheet

Caption = list[tuple[str, tuple[int, int, int] | None]]  # pieces of text, each behind a sample of a color or none


def chart(size: tuple[float, float], columns: int = 1, **options) -> tuple:
    """A figure of matplotlib that no window shows, and its axes, side by side if there are several."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def zoom_for(image: Image.Image, panel_side: int) -> int:
    """Whole factor that brings the longer side near a panel's."""
    return max(1, round(panel_side / max(image.size)))


def draw_grid(image: Image.Image, layout: PatchLayout, zoom: int) -> Image.Image:
    """The image with every patch outlined: base patches by a thin line, white on dark and black on light parts, larger
    ones in their size's color, which also tints them a little."""
    canvas = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.LANCZOS).convert("RGB")
    thin, bold = Image.new("L", canvas.size), Image.new("RGBA", canvas.size)
    draw_thin, draw_bold = ImageDraw.Draw(thin), ImageDraw.Draw(bold)
    width = min(2, max(1, layout.patch_size * zoom // 12))
    for side, color in zip(layout.sizes, COLORS):
        for token in layout.sizes[side].tolist():
            x, y = (int(place[token]) * layout.patch_size * zoom for place in (layout.column_T, layout.row_T))
            corners = (x, y, x + side * zoom, y + side * zoom)
            if side == layout.patch_size:
                draw_thin.rectangle(corners, outline=80)
            else:
                draw_bold.rectangle(corners, fill=(*color, 50), outline=(*color, 230), width=width)
    canvas.paste(canvas.convert("L").point(lambda grey: 0 if grey > 140 else 255).convert("RGB"), mask=thin)
    return Image.alpha_composite(canvas.convert("RGBA"), bold).convert("RGB")


def draw_heat(
    image: Image.Image, values_HW: Tensor, cell: int, zoom: int, span: tuple[float, float] | None = None
) -> Image.Image:
    """The image in grey under a heat map; cells whose value is not finite stay grey.

    Args:
        values_HW: one value per cell.
        cell: side of a cell in the image's pixels; cells may overhang at the right and bottom.
        zoom: whole factor by which the picture is larger than the image.
        span: values of the darkest and the brightest color; those of the map if not given.
    """
    from matplotlib import colormaps

    size = (image.width * zoom, image.height * zoom)
    values = values_HW.numpy()[np.ix_(np.arange(image.height) // cell, np.arange(image.width) // cell)]
    inside = np.isfinite(values)
    low, high = span or ((values[inside].min(), values[inside].max()) if inside.any() else (0, 1))
    heat = colormaps["viridis"]((np.where(inside, values, low) - low) / max(high - low, 1e-9))
    heat[..., 3] = np.where(inside, 0.65, 0)
    heat = Image.fromarray((heat * 255).astype(np.uint8), "RGBA")
    heat = heat.resize(size, Image.Resampling.NEAREST)
    return Image.alpha_composite(image.convert("L").resize(size).convert("RGBA"), heat).convert("RGB")


def size_caption(text: str, layout: PatchLayout) -> Caption:
    """A caption that ends in the number of patches of each size, with its color."""
    counts = [(f"{len(index)} x {size} px", color) for (size, index), color in zip(layout.sizes.items(), COLORS)]
    return [(text, None), *counts]


def compose(panels: list[tuple[str | Caption, Image.Image]]) -> Image.Image:
    """A sheet of pictures as large as the first, each with a caption below; more than three take two rows.

    The sheet's size depends on the pictures' only, so that the frames of a video agree.
    """
    width, height = panels[0][1].size
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    rows = -(-len(panels) // columns)
    line = max(14, width // 36)
    step = height + line + 2 * GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * step + GAP), "white")
    captions = [[(caption, None)] if isinstance(caption, str) else caption for caption, _ in panels]
    size = next((size for size in range(line, 8, -1) if all(_length(c, size) <= width for c in captions)), 8)
    for index, (caption, (_, picture)) in enumerate(zip(captions, panels)):
        x, y = GAP + index % columns * (width + GAP), GAP + index // columns * step
        picture = picture if picture.size == (width, height) else picture.resize((width, height))
        sheet.paste(picture, (x, y))
        _write(ImageDraw.Draw(sheet), caption, (x, y + height + GAP // 2), size)
    return sheet


def _length(caption: Caption, size: int) -> float:
    font = ImageFont.load_default(size)
    return sum(font.getlength(text) + (size if color else 0) + size for text, color in caption)


def _write(draw: ImageDraw.ImageDraw, caption: Caption, corner: tuple[int, int], size: int) -> None:
    font, (x, y) = ImageFont.load_default(size), corner
    for text, color in caption:
        if color:
            sample = (x, y + size // 5, x + size * 4 // 5, y + size)
            draw.rectangle(sample, fill=color, outline="black")
            x += size
        draw.text((x, y), text, fill="black", font=font)
        x += font.getlength(text) + size


def even(image: Image.Image) -> Image.Image:
    """The image with even sides, as video codecs need them."""
    return ImageOps.expand(image, (0, 0, image.width % 2, image.height % 2), "white")
