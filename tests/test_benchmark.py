"""The benchmark measures models that compute what they claim."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from apt_backbones import APTEva02
from tests.golden import relative_error

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
from ordinary_eva02 import OrdinaryEva02  # noqa: E402

CONFIG = """
model = dict(backbone=dict(type="APTEva02", img_size=128, embed_dim=48, depth=2, num_heads=3, window_size=4,
                           global_blocks=(1,), thresholds={32: 4.0, 64: 4.0}))
"""


@pytest.mark.parametrize("size", [(128, 128), (64, 128)])
@pytest.mark.parametrize("options", [dict(window_size=4, global_blocks=(1,)), dict(use_cls_token=True)])
def test_the_dense_baseline_equals_the_packed_model(size, options):
    torch.manual_seed(0)
    model = APTEva02(img_size=128, embed_dim=48, depth=3, num_heads=3, out_indices=(0, 2), **options).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for ours, theirs in zip(model(images), OrdinaryEva02(model)(images)):
            assert relative_error(ours, theirs) <= 1e-5


def test_the_dense_baseline_pads_windows_as_vitdet_does():
    """A grid of 5 x 6 cells in windows of 4: padded to 8 x 8, then cut back."""
    model = APTEva02(img_size=128, embed_dim=48, depth=2, num_heads=3, window_size=4).eval()
    with torch.no_grad():
        assert OrdinaryEva02(model)(torch.randn(1, 3, 80, 96))[0].shape == (1, 48, 5, 6)


def test_the_dense_baseline_is_dense():
    with pytest.raises(ValueError, match="without thresholds"):
        OrdinaryEva02(APTEva02(img_size=128, embed_dim=48, depth=2, num_heads=3, thresholds={32: 1.0}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    half = torch.full((96, 160, 3), 120, dtype=torch.uint8)
    half[:, 80:] = torch.randint(0, 256, (96, 80, 3), dtype=torch.uint8)
    Image.fromarray(half.numpy()).save(tmp_path / "half.png")
    return tmp_path


def run(monkeypatch, folder, *arguments):
    command = ["benchmark.py", folder / "config.py", "--images", folder / "half.png", "--device", "cpu", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    runpy.run_path(str(TOOLS / "benchmark.py"), run_name="__main__")


def test_a_run_reports_every_mode_with_what_it_kept(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--keep", 0.7, "--rounds", 1, "--stages", "--json", folder / "b.json")
    report = json.loads((folder / "b.json").read_text())
    rows = {row["mode"]: row for row in report["results"][0]["rows"]}
    assert list(rows) == ["dense", "dense-rect", "packed", "random 0.7", "resizing 0.7", "apt 0.7"]
    assert rows["dense"]["content_kept"] == rows["dense"]["padding_kept"] == 1
    assert rows["dense-rect"]["padding_kept"] == 0
    assert rows["apt 0.7"]["content_kept"] == rows["resizing 0.7"]["content_kept"] <= 0.75
    assert rows["apt 0.7"]["gflops_per_image"] < rows["dense-rect"]["gflops_per_image"]
    for row in rows.values():
        assert len(row["seconds"]) == 1 and row["speed_vs_dense"]["min"] <= row["speed_vs_dense"]["max"]
    assert {"hardware", "torch", "command", "date"} <= report.keys()
    assert "apt 0.7" in capsys.readouterr().out


def test_training_steps_leave_out_modes_without_new_layers(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--train-step", "--rounds", 1, "--plot", folder / "speed.png")
    printed = capsys.readouterr().out
    assert "apt 0.7" in printed and "random" not in printed and "training step" in printed
    assert Image.open(folder / "speed_config.png").width > 300


@pytest.mark.parametrize("config", ["det_configs/eva02_tiny_apt_photoshapes.py", "seg_configs/eva02_l_apt_512.py"])
def test_the_project_s_own_configs_can_be_benchmarked(config):
    _, arguments = runpy.run_path(str(TOOLS / "benchmark.py"))["load_backbone_config"](str(TOOLS.parent / config))
    assert APTEva02(**{**arguments, "depth": 1, "out_indices": (0,), "global_blocks": ()}).thresholds


@pytest.mark.parametrize(
    "arguments, message", [(["--modes", "dense,fast"], "unknown modes fast"), (["--keep", 0.0], "above 0")]
)
def test_mistakes_end_in_one_line(folder, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, *arguments)
