"""The picture tool, run as a user runs it."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from apt_backbones.images import find_images, read_rgb

TOOL = Path(__file__).parents[1] / "tools" / "visualize.py"


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_pictures_are_written_and_named_after_their_images(tmp_path):
    pixels = np.zeros((96, 160, 3), dtype=np.uint8)
    pixels[:, 80:] = np.random.default_rng(0).integers(0, 256, (96, 80, 3))
    Image.fromarray(pixels).save(tmp_path / "half.png")
    done = run(tmp_path, "--out-dir", tmp_path / "out", "--show", "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("half_patches.png")
    sheet = Image.open(tmp_path / "out" / "half_patches.png")
    assert sheet.width > 4 * 160 and sheet.height > 96


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "no file or folder missing.jpg"),
        ([TOOL], "is not a readable image"),
        ([TOOL, "--thresholds", "5.5"], "thresholds must be SIZE:THRESHOLD"),
        ([TOOL, "--thresholds", "64:5.5"], r"must be [32]"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),  # transparent: the white below shows
        ("P", 0, (0, 0, 0)),
        ("I;16", 257 * 50, (50, 50, 50)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_images_of_every_mode_become_rgb(tmp_path, mode, value, expected):
    Image.new(mode, (3, 2), value).save(tmp_path / "x.tif")
    image = read_rgb(tmp_path / "x.tif")
    assert image.mode == "RGB" and image.size == (3, 2) and image.getpixel((0, 0)) == expected


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by a quarter turn to show
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").size == (2, 4)


def test_damaged_images_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval switches it on for the whole process
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        read_rgb(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="no images in"):
        (tmp_path / "empty").mkdir()
        find_images([str(tmp_path / "empty")])
