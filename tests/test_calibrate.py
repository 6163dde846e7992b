"""Thresholds that meet a token budget."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from apt_backbones import PatchLayout, score_patches, select_patches
from apt_backbones.calibrate import calibrate_thresholds, kept_shares, score_maps_of, share_curves
from benchmarks import tokens_kept
from tests.golden import load_golden
from tests.scripts import ROOT, run_script
from tools.calibrate import mean_share, try_splits
from tools.patch_settings import settings_of

PHOTOS = [v.permute(2, 0, 1)[None].float() for k, v in load_golden("patch_scores").arrays.items() if "image/" in k]
SIZES = (16, 32, 64)
TOOL = "tools/calibrate.py"


@pytest.fixture(scope="module")
def score_maps():
    return [score_maps_of(photo, SIZES) for photo in PHOTOS]


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("ratios", [None, (1.0, 0.9, 0.5)])
def test_the_budget_is_met_by_the_model_s_own_layout(score_maps, keep, ratios):
    thresholds = calibrate_thresholds(score_maps, 8, keep, ratios)
    tokens = cells = 0
    for photo in PHOTOS:
        sides = select_patches(score_patches(photo, SIZES), thresholds, 8, photo.shape[2:])
        tokens += PatchLayout.build(sides, 8, SIZES).num_tokens
        cells += sides.numel()
    assert keep - 0.02 < tokens / cells <= keep
    assert [thresholds[size] / thresholds[16] for size in SIZES] == pytest.approx(ratios or (1, 1, 1), abs=1e-3)


def test_a_budget_of_whole_patches_takes_no_patch_more():
    """(1 - 0.7) * 40 is a little more than 12, four patches' savings, in floating point."""
    maps = {16: torch.zeros(1, 4, 10), 32: torch.arange(10.0).view(1, 2, 5)}
    assert calibrate_thresholds([maps], 16, 0.7) == {32: 3.0001}


def test_a_size_whose_ratio_is_zero_is_not_used(score_maps):
    thresholds = calibrate_thresholds(score_maps, 8, 0.6, (1, 0, 0))
    assert thresholds == {
        **calibrate_thresholds([{k: m[k] for k in (8, 16)} for m in score_maps], 8, 0.6),
        32: 0,
        64: 0,
    }


def test_a_score_that_many_patches_share_is_passed():
    """Merging is strict, so the threshold must lie above the scores that the budget needs."""
    maps = [score_maps_of(torch.zeros(1, 3, 64, 64), (16,)), score_maps_of(PHOTOS[0], (16,))]
    maps[0][16] += 5.0
    (threshold,) = calibrate_thresholds(maps[:1], 8, 0.9).values()
    assert 5 < threshold < 5.001


def test_curves_are_the_shares_at_every_threshold(score_maps):
    steps, ratios = [0.0, 3.0, 5.0, 5.5, 9.0], (1.0, 0.9, 0.5)
    curves = share_curves(score_maps, 8, steps, ratios)
    for step, shares in zip(steps, curves):
        thresholds = {size: step * ratio for size, ratio in zip(SIZES, ratios)}
        assert shares.tolist() == pytest.approx(kept_shares(score_maps, thresholds, 8).tolist())


def test_shares_count_the_tokens_of_every_image(score_maps):
    thresholds = {16: 5.0, 32: 4.0, 64: 3.0}
    for photo, share in zip(PHOTOS, kept_shares(score_maps, thresholds, 8)):
        sides = select_patches(score_patches(photo, SIZES), thresholds, 8, photo.shape[2:])
        assert float(share) == pytest.approx(PatchLayout.build(sides, 8, SIZES).num_tokens / sides.numel())


def test_the_mean_share_is_of_all_cells_not_of_images():
    small, large = ({16: torch.zeros(1, 2 * n, 2 * n), 32: torch.full((1, n, n), float(n))} for n in (1, 2))
    assert mean_share([small, large], {32: 1.5}, 16) == pytest.approx((1 + 16) / 20)


@pytest.mark.parametrize("scorer", ["laplacian", "upsample_mse"])
def test_budgets_are_met_whatever_the_scorer_s_unit(scorer):
    """Mean squared errors are of the order of 0.0001."""
    maps = [score_maps_of(photo, (16, 32), scorer) for photo in PHOTOS]
    shares = kept_shares(maps, calibrate_thresholds(maps, 8, 0.6), 8)
    cells = torch.tensor([scores[8].numel() for scores in maps])
    assert 0.58 < float((shares * cells).sum() / cells.sum()) <= 0.6


def test_keeping_everything_merges_nothing(score_maps):
    assert calibrate_thresholds(score_maps, 8, 1.0) == {16: 0.0, 32: 0.0, 64: 0.0}


@pytest.mark.parametrize("ratios", [(1, -1, 1), (0, 0, 0), (1, 1)])
def test_impossible_ratios_are_refused(score_maps, ratios):
    with pytest.raises(ValueError, match="ratios"):
        calibrate_thresholds(score_maps, 8, 0.7, ratios)


@pytest.mark.parametrize("keep, message", [(0.01, "cannot be met"), (0.0, "above 0"), (1.5, "at most 1")])
def test_impossible_budgets_are_refused(score_maps, keep, message):
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(score_maps, 8, keep)


@pytest.fixture
def folder(tmp_path):
    for index, photo in enumerate(PHOTOS):
        Image.fromarray(photo[0].permute(1, 2, 0).numpy().astype(np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def test_the_tool_prints_the_line_to_paste(folder, monkeypatch, capsys):
    options = ("--images", folder, "--sizes", 32, 64, "--keep", 0.7)
    run_script(monkeypatch, TOOL, *options, "--plot", folder / "keep.png")
    printed = capsys.readouterr().out.splitlines()
    maps = [score_maps_of(photo, (32, 64)) for photo in PHOTOS]
    assert printed[-1] == f"thresholds={calibrate_thresholds(maps, 16, 0.7)}"
    assert "3 images keep 6" in printed[0] or "3 images keep 70.0%" in printed[0]
    assert Image.open(folder / "keep.png").width > 500


def test_the_tool_takes_sizes_and_scale_from_a_config(folder, monkeypatch, capsys):
    config = folder / "config.py"
    config.write_text(
        "model = dict(backbone=dict(patch_size=8, thresholds={16: 1.0}, scorer='laplacian'))\n"
        "test_pipeline = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]\n"
    )
    run_script(monkeypatch, TOOL, "--images", folder, "--config", config, "--keep", 0.5)
    printed = capsys.readouterr().out.splitlines()[-1]
    size, threshold = re.fullmatch(r"thresholds={(\d+): ([\d.]+)}", printed).groups()
    assert size == "16" and 0 < float(threshold) < 1, "a Laplacian's range, not an entropy's"


@pytest.mark.parametrize(
    "resize, size",
    [
        ("scale=(64, 96), keep_ratio=True", (96, 32)),
        ("scale=(64, 96)", (64, 96)),
        ("scale_factor=0.5, keep_ratio=True", (150, 50)),
    ],
)
def test_images_are_resized_as_the_model_sees_them(resize, size, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "model = dict(backbone=dict(patch_size=8, thresholds={16: 1.0}))\n"
        f"test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', {resize})]\n"
    )
    assert settings_of(str(config)).prepare(Image.new("RGB", (300, 100))).size == size


def test_the_sample_depends_on_the_seed_only(folder, monkeypatch, capsys):
    lines = []
    options = ("--images", folder, "--sizes", 32, "--keep", 0.7, "--sample", 1)
    for seed in (0, 0, 1):
        run_script(monkeypatch, TOOL, *options, "--seed", seed)
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] != lines[2] and lines[0].startswith("1 images")


def test_the_split_with_the_least_feature_distance_is_taken(folder, monkeypatch, capsys):
    config = ROOT / "det_configs/eva02_tiny_apt_photoshapes.py"
    weights = ROOT / "det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors"
    budget = ["--images", folder, "--config", config, "--keep", 0.8]
    run_script(monkeypatch, TOOL, *budget, "--checkpoint", weights, "--error-sample", 2)
    printed = capsys.readouterr().out
    errors = [float(error) for error in re.findall(r"% +│ (\d\.\d+)", printed)]
    assert errors == sorted(errors) and len(errors) >= 5, "every split meets the budget; the best comes first"
    best = re.search(r"│ ([\d. :]+?)(?: \(as given\))? +│", printed)[1].split(" : ")
    run_script(monkeypatch, TOOL, *budget, "--ratios", *best)
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]


def test_splits_are_compared_on_content_without_padding(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    content, asked = torch.ones(1, 2, 2, dtype=torch.bool), []
    error = SimpleNamespace(relative=lambda cells=None: asked.append(cells) or 0.0)
    model = SimpleNamespace(trunk=SimpleNamespace(thresholds={32: 1.0}, patch_size=16), features=lambda crops: None)
    model.crops, model.error = lambda image: SimpleNamespace(content_BHW=content), lambda crops, dense: error
    maps = [{16: torch.zeros(1, 2, 2), 32: torch.zeros(1, 1, 1)}]
    try_splits(model, [tmp_path / "0.png"], maps, 0.5, [1.0])
    assert asked and all(cells is content for cells in asked)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", 0.7], "name the merged patch sizes"),
        (["--sizes", 32, "--keep", 2], "at most 1"),
        (["--sizes", 32, "--keep", 0.7, "--resize", 100000], "--resize 100000 would take gigabytes; use at most 8192"),
        (["--sizes", 32, 48, "--keep", 0.7], "must be even and double"),
        (["--sizes", 32, "--keep", 0.7, "--checkpoint", "x.pth"], "--checkpoint needs the --config"),
        (["--config", ROOT / "det_configs/eva02_l_dense_1536.py", "--keep", 0.7], "has no thresholds"),
        (["--sizes", 32, "--keep", 1, "--plot", "x.png"], "no threshold to plot"),
    ],
)
def test_mistakes_end_in_one_line(folder, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, TOOL, "--images", folder, *arguments)


@pytest.mark.parametrize("name", ["plot.nonsense", "0.png/plot.png"])
def test_a_plot_that_cannot_be_written_leaves_the_thresholds(name, folder, monkeypatch, capsys):
    """They are printed first; 0.png is an image, not a folder."""
    with pytest.raises(SystemExit, match=r"^error: .*(nonsense|0\.png)"):
        run_script(monkeypatch, TOOL, "--images", folder, "--sizes", 32, "--keep", 0.7, "--plot", folder / name)
    assert capsys.readouterr().out.splitlines()[-1].startswith("thresholds={32: ")


def test_the_base_grid_holds_no_uninitialised_numbers():
    """They could be NaN, which marks an image as unusable."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        maps = score_maps_of(torch.rand(1, 3, 32, 32) * 255, (16,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert maps[8].isfinite().all()


def test_shares_of_tokens_to_expect_lie_between_those_of_the_images(tmp_path, monkeypatch, capsys):
    """Of a smooth and a busy one, at the paper's thresholds."""
    Image.new("RGB", (64, 48), "grey").save(tmp_path / "smooth.png")
    Image.effect_noise((64, 48), 100).convert("RGB").save(tmp_path / "busy.png")
    task = tokens_kept.TASKS[2]._replace(prepare=tokens_kept.shortest(64))
    monkeypatch.setattr(tokens_kept, "TASKS", (task,))
    monkeypatch.setattr("sys.argv", ["tokens_kept", str(tmp_path), "--out", str(tmp_path / "kept.json")])
    tokens_kept.main()
    (found,) = json.loads((tmp_path / "kept.json").read_text())["results"]
    shares = [found[name] for name in ("10th percentile", "median", "90th percentile")]
    assert 0.25 <= shares[0] < shares[1] < shares[2] <= 1
    assert found["mean"] == pytest.approx(shares[1], abs=1e-4), "of two"
    assert "segmenter, 512 px: mean" in capsys.readouterr().out
