"""The tools' --device."""

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
