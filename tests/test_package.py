"""What importing costs and needs."""

import subprocess
import sys

import pytest

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
