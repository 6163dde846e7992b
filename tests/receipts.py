"""Receipts in the form of ICDAR-2019-SROIE's."""

from pathlib import Path

from PIL import Image, ImageDraw

LINE = (10, 20, 60, 20, 60, 30, 10, 30)  # corners, pixels


def save_receipts(folder: Path, count: int = 5, width: int = 80, height: int = 160) -> Path:
    """White paper named 0, 1, ..., of which number n has n dark lines, 20 pixels apart."""
    for kind in ("img", "box"):
        (folder / kind).mkdir(parents=True)
    for name in range(count):
        image, lines = Image.new("RGB", (width, height), "white"), []
        for number in range(name):
            corners = [value + 20 * number * (index % 2) for index, value in enumerate(LINE)]
            ImageDraw.Draw(image).polygon(corners, fill=(name, 0, 0))
            lines.append(",".join(map(str, corners)) + ",TOTAL, 9.00")
        image.save(folder / f"img/{name}.jpg")
        (folder / f"box/{name}.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder
