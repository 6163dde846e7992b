"""What the tools refuse before they start: devices that are not there, and counts of nothing."""

import pytest
import torch

from tests.scripts import run_script

ARGUMENTS = {
    "benchmark": ["--scorers"],
    "distill_scorer": ["vit_tiny_patch16_224", "--images", ".", "--out", "x.safetensors"],
    "finetune_features": ["vit_tiny_patch16_224", "--images", ".", "--out", "x.safetensors"],
}


@pytest.mark.parametrize("tool", ARGUMENTS)
@pytest.mark.parametrize(
    "device, message",
    [("cuda", "torch finds no GPU and driver; use cpu"), ("gpu", "gpu is no device; use cuda or cpu")],
)
def test_devices_that_are_not_there_are_refused(tool, device, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, f"tools/{tool}.py", *ARGUMENTS[tool], "--device", device)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument --device: {message}")


@pytest.mark.parametrize(
    "tool, flag",
    [("distill_scorer", flag) for flag in ("--copies", "--epochs", "--sample", "--resize")]
    + [("finetune_features", flag) for flag in ("--iterations", "--batch", "--resize")],
)
def test_counts_of_nothing_are_refused(tool, flag, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, f"tools/{tool}.py", *ARGUMENTS[tool], flag, "0")
    assert stop.value.code == f"error: {flag} must be at least 1"


@pytest.mark.parametrize("count", ["0", "1"])
def test_clusters_are_several(count, monkeypatch):
    """Of one nothing is nearer than of another."""
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "tools/distill_scorer.py", *ARGUMENTS["distill_scorer"], "--prototypes", count)
    assert stop.value.code == "error: --prototypes must be at least 2"
