"""The picture tool, run as a user runs it."""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tools.cli import names_of
from apt_backbones import PatchLayout
from apt_backbones.images import find_images, read_rgb
from tests.scripts import ROOT, run_script
from tools import drawing, video, visualize
from tools.patch_settings import settings_of

TOOL = ROOT / "tools" / "visualize.py"

DET = ["--config", ROOT / "det_configs/eva02_tiny_apt_photoshapes.py"]
DET_WEIGHTS = ROOT / "det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors"
SEG_WEIGHTS = ROOT / "seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"


def test_a_video_has_a_sheet_per_frame(tmp_path, monkeypatch, capsys):
    frames = [Image.new("RGB", (41, 33), (40 * i, 0, 0)) for i in range(3)]
    video.write_video(tmp_path / "in.gif", iter(frames), fps=10)
    video.write_video(tmp_path / "in.mp4", map(drawing.even, frames), fps=10)
    run_script(monkeypatch, TOOL, tmp_path, "--out-dir", tmp_path / "out")  # both
    run_script(monkeypatch, TOOL, tmp_path / "in.mp4", "--out-dir", tmp_path / "out", "--format", "gif")
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(set(written)) == 3 and sorted(path.suffix for path in written) == [".gif", ".mp4", ".mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)
    for path in written:
        sheets, fps, count = video.read_frames(path)
        sheets = list(sheets)
        assert len(sheets) == count == 3 and fps == pytest.approx(10)
        assert sheets[0].width > 2 * 600 and len({sheet.size for sheet in sheets}) == 1


@pytest.mark.parametrize("size", [(1, 1), (336, 336), (97, 1), (1536, 40)])
def test_images_of_any_size_are_drawn(tmp_path, monkeypatch, size):
    Image.new("RGB", size, (90, 120, 200)).save(tmp_path / "x.png")
    run_script(monkeypatch, TOOL, tmp_path / "x.png", "--out-dir", tmp_path, "--show", "both")
    sheet = Image.open(tmp_path / "x_patches.png")
    assert sheet.width > 2 * size[0] and sheet.height > size[1]


def test_lines_leave_the_picture_visible_and_show_on_black_and_white():
    sides = np.full((1, 24, 24), 14)
    sides[:, :12] = 28
    layout = PatchLayout.build(torch.from_numpy(sides), 14, (28,))
    for shade in (0, 255):
        plain = Image.new("RGB", (336, 336), (shade,) * 3)
        picture = np.asarray(drawing.draw_grid(plain, layout, zoom=3)).astype(int)
        change = np.abs(picture - shade).max(-1)
        base = change[12 * 42 + 1 :]
        assert 0.02 < (base > 0).mean() < 0.1, "thin lines"
        assert base.max() > 60, "that are seen"
        assert np.median(change[: 12 * 42]) < 60, "merged patches are tinted, not covered"


def test_overhanging_cells_of_a_heat_map_keep_their_size():
    """Three cells of 32 pixels over 80: the last is cut, the others are not squeezed."""
    heat = drawing.draw_heat(Image.new("RGB", (80, 32)), torch.tensor([[0.0, 1.0, 0.0]]), 32, zoom=1)
    colours = np.asarray(heat)[16]
    assert (colours[:32] == colours[0]).all() and (colours[32:64] == colours[40]).all()
    assert (colours[64:] == colours[0]).all() and (colours[0] != colours[40]).any()


def test_settings_come_from_a_config():
    settings = settings_of(str(DET[1]))
    assert (settings.patch_size, settings.thresholds, settings.scorer) == (8, {16: 0.0155, 32: 0.0046}, "laplacian")
    assert settings.prepare(Image.new("RGB", (512, 384))).size == (192, 144)
    whole = settings_of(str(ROOT / "seg_configs/eva02_l_apt_512_ms.py"))
    assert whole.thresholds == {32: 5.75} and whole.prepare(Image.new("RGB", (600, 400))).size == (768, 512)


@pytest.mark.parametrize("do_pad", [True, False])
def test_settings_come_from_a_llava_folder(tmp_path, do_pad):
    """Images are prepared as its processor does it: the language model gets tokens of padding, too."""
    from llava_apt import LlavaAptConfig
    from llava_apt.image_processing import LlavaAptImageProcessor
    from tests.llava_tiny import SIDE, stock_config

    stock_config().save_pretrained(tmp_path)
    LlavaAptConfig.from_pretrained(tmp_path, thresholds={28: 4.5}, scorer="laplacian").save_pretrained(tmp_path)
    crop = {"height": SIDE, "width": SIDE}
    LlavaAptImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop, do_pad=do_pad).save_pretrained(tmp_path)
    settings = settings_of(str(tmp_path))
    assert (settings.patch_size, settings.thresholds, settings.scorer) == (14, {28: 4.5}, "laplacian")
    seen = np.asarray(settings.prepare(Image.new("RGB", (300, 150), "white")))
    assert seen.shape == (SIDE, SIDE, 3) and (seen[SIDE // 2] == 255).all() and (seen[0] < 255).all() == do_pad


def test_predictions_are_drawn_beside_the_patches(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (150, 200, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    run_script(monkeypatch, TOOL, tmp_path / "x.png", *DET, "--out-dir", tmp_path)
    patches = Image.open(tmp_path / "x_patches.png").convert("RGB")
    run_script(
        monkeypatch, TOOL, tmp_path / "x.png", *DET, "--checkpoint", DET_WEIGHTS, "--score", 0, "--out-dir", tmp_path
    )
    sheet = Image.open(tmp_path / "x_patches.png").convert("RGB")
    assert sheet.width == patches.width and sheet.height > 1.9 * patches.height
    upper = np.asarray(sheet)[: patches.height - 16]
    assert (upper == np.asarray(patches)[: patches.height - 16]).all(), "the patches as without a checkpoint"


def test_predictions_of_classes_without_colours_are_drawn(tmp_path, monkeypatch):
    config = tmp_path / "own.py"
    config.write_text(
        f"_base_ = '{ROOT}/seg_configs/eva02_tiny_apt_photoshapes.py'\n"
        "data = dict(type='BaseSegDataset', metainfo=dict(classes=tuple('abcdefg')))\n"
        "test_dataloader = dict(dataset=data)\n"
    )
    picture = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(picture)
    flags = ["--config", config, "--checkpoint", SEG_WEIGHTS, "--out-dir", tmp_path]
    run_script(monkeypatch, TOOL, picture, *flags)
    first = (tmp_path / "x_patches.png").read_bytes()
    run_script(monkeypatch, TOOL, picture, *flags)
    assert (tmp_path / "x_patches.png").read_bytes() == first, "the same colours every time"


def test_predictions_are_those_of_the_patches_that_are_drawn():
    arguments = argparse.Namespace(
        config=str(DET[1]), checkpoint=str(DET_WEIGHTS), patch_size=None, scorer="entropy", resize=None, score=0.3
    )
    sheets = visualize.Sheets(argparse.Namespace(**vars(arguments), thresholds=["16=5.5"], show="grid"))
    trunk = sheets.model.trunk
    assert (trunk.scorer, trunk.thresholds) == ("entropy", {16: 5.5}), "the configuration has a Laplacian's"


def test_pictures_of_the_same_name_are_told_apart():
    paths = [Path(name) for name in ("p/a/x.png", "q/a/x.png", "x.jpg", "y.png", "b/z.jpg", "b/z.png")]
    named = [name for name in names_of([*paths, paths[0]]).values()]
    assert named == ["p_a_x_png", "q_a_x_png", "x_jpg", "y", "z_jpg", "z_png"]
    alike = [Path("a.b/x.png"), Path("a_b/x.png")]
    assert names_of(alike) == {alike[0]: "x_1", alike[1]: "x_2"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "no file or folder missing.jpg"),
        (["clip.mp4"], "clip.mp4 is not a readable video"),
        ([TOOL, "--config", ROOT / "det_configs/eva02_tiny_dense_photoshapes.py"], "has no thresholds"),
        ([TOOL, "--config", "."], "no config.json in"),
        ([TOOL, "--config", "x.py"], "no configuration at x.py"),
        ([TOOL, "--checkpoint", "x.pth"], "--checkpoint needs the --config"),
        ([TOOL, *DET, "--checkpoint", "x.pth"], "no checkpoint at x.pth"),
        ([TOOL, "--resize", "0"], "--resize must be at least 1"),
        ([TOOL, "--resize", "100000"], "--resize 100000 would take gigabytes; use at most 8192"),
        ([TOOL], "is not a readable image"),
        ([TOOL, "--thresholds", "5.5"], "thresholds must be SIZE=THRESHOLD"),
        ([TOOL, "--thresholds", "64=5.5"], r"must be [32]"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, TOOL, *arguments)
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


def test_floating_point_images_are_refused(tmp_path):
    """Of 0..1 or 0..255: nobody says."""
    Image.new("F", (3, 2), 0.5).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif has floating point pixels, whose range is not known; convert it"):
        read_rgb(tmp_path / "x.tif")


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


def test_only_videos_need_imageio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    without = importlib.reload(video)
    with pytest.raises(ImportError, match="videos need imageio and PyAV: pip install"):
        without.read_frames(tmp_path / "clip.mp4")
