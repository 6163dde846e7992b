"""What importing costs and needs."""

import subprocess
import sys

import pytest

from apt_backbones.versions import require

FOREIGN = {"mmengine", "mmcv", "mmdet", "mmseg", "transformers"}


@pytest.mark.parametrize(
    "module, unwanted",
    [
        ("apt_backbones", FOREIGN | {"timm"}),
        ("apt_backbones.backbones.eva02", FOREIGN),
        ("apt_backbones.checkpoint", FOREIGN),
        ("llava_apt", {"mmengine", "mmcv", "mmdet", "mmseg"}),
    ],
)
def test_imports_do_not_need_the_toolboxes(module, unwanted):
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & {unwanted!r}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_every_public_name_exists():
    import apt_backbones

    for name in apt_backbones.__all__:
        assert getattr(apt_backbones, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        apt_backbones.surprise  # noqa: B018


@pytest.mark.parametrize(
    "installed, is_new_enough", [("2.9.1", False), ("2.10.0+cu130", True), ("2.10", True), ("3.0rc1", True)]
)
def test_a_package_that_is_too_old_is_named_with_the_command_that_helps(monkeypatch, installed, is_new_enough):
    monkeypatch.setattr("apt_backbones.versions.version", lambda package: installed)
    if is_new_enough:
        return require("torch", "2.10")
    with pytest.raises(ImportError, match=r"^torch 2\.9\.1 is too old: pip install 'torch>=2\.10'$"):
        require("torch", "2.10")


def test_a_package_that_is_not_there_is_left_to_its_own_import():
    require("no-such-package", "1.0")
