"""Heat maps of feature errors, drawn by the tool as a user runs it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from apt_backbones.images import read_rgb
from tests.scripts import ROOT, run_script
from tools import analyze_error
from tools.mm_model import MMModel

CASES = {
    "det": ("det_configs/eva02_tiny_apt_photoshapes.py", "eva02_tiny_apt_photoshapes.safetensors"),
    "seg": ("seg_configs/eva02_tiny_apt_photoshapes.py", "eva02_tiny_dense_photoshapes.safetensors"),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    config, weights = CASES[request.param]
    return str(ROOT / config), str(ROOT / f"{request.param}_configs/checkpoints/{weights}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph with a smooth left half, and an image of one pixel."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    pixels[:, :100] = np.linspace(60, 90, 100)[:, None]
    Image.fromarray(pixels).save(folder / "half.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    return folder


def test_errors_are_where_patches_merge(case, folder):
    model = MMModel(*case)
    crops = model.crops(read_rgb(folder / "half.png"))
    heat = analyze_error.heat_of(model, crops, model.error(crops))
    assert heat.shape == crops.size and heat.isfinite().all()
    assert heat[:, : heat.shape[1] // 3].mean() > heat[:, heat.shape[1] // 2 + 20 :].mean()
    _, errors = analyze_error.analyze(model, read_rgb(folder / "half.png"))
    assert 0.3 < errors["kept"] < 0.9
    assert errors["in merged patches"] > errors["error"] > errors["in base patches"] > 0


def test_without_merging_there_is_no_error(case, folder):
    model = MMModel(*case)
    model.trunk.thresholds = dict.fromkeys(model.trunk.thresholds, 0.0)
    _, errors = analyze_error.analyze(model, read_rgb(folder / "half.png"))
    assert errors["kept"] == 1 and errors["error"] < 1e-5


def test_the_image_is_shown_as_the_model_sees_it(case, folder):
    model = MMModel(*case)
    image = read_rgb(folder / "half.png")
    seen = analyze_error.pixels_of(model, model.crops(image))
    resized = image.resize(seen.size, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(resized)).mean() < 3


def test_the_tool_draws_every_image_and_lists_its_errors(case, folder, tmp_path, monkeypatch, capsys):
    model = ("--config", case[0], "--checkpoint", case[1])
    run_script(monkeypatch, "tools/analyze_error.py", folder, *model, "--out-dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"half_error.png", "pixel_error.png"}
    printed = capsys.readouterr().out
    assert "half.png" in printed and "mean of 2" in printed


def test_a_damaged_image_is_left_out_of_the_table(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval, of other tests, sets it for all
    (tmp_path / "damaged.png").write_bytes((folder / "half.png").read_bytes()[:500])
    config, weights = CASES["det"]
    model = ("--config", ROOT / config, "--checkpoint", ROOT / "det_configs/checkpoints" / weights)
    images = (tmp_path / "damaged.png", folder / "half.png")
    run_script(monkeypatch, "tools/analyze_error.py", *images, *model, "--out-dir", tmp_path)
    printed = capsys.readouterr()
    assert re.search(r"left out .*damaged\.png.*not a readable image", printed.err) and "mean of 1" in printed.out


def test_dense_configs_are_refused(folder, monkeypatch):
    dense = CASES["det"][0].replace("apt", "dense")
    with pytest.raises(ValueError, match="has no thresholds: its model is dense"):
        MMModel(str(ROOT / dense), str(ROOT / "det_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"))


def test_crops_cover_an_image_once(case):
    """Of a segmenter, crops lie side by side, the last ones at the far edge; a detector sees the padded square."""
    model = MMModel(*case)
    crops = model.crops(Image.new("RGB", (300, 200)))
    covered = torch.zeros(crops.size)
    for top, left in crops.places:
        covered[top : top + crops.images.shape[2], left : left + crops.images.shape[3]] += 1
    assert covered.min() == 1
    assert crops.content_BHW.any((1, 2)).all()
