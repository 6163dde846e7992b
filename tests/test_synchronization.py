"""A forward has one host-device synchronisation: to learn how many tokens the batch has."""

import pytest
import torch
import torch.nn.functional as F

from apt_backbones import freeze_host
from tests.host_reads import host_reads
from tests.test_eva02 import WINDOWS, pictures, tiny

THRESHOLDS = {32: 6.0, 64: 5.0}
MODES = [dict(thresholds=THRESHOLDS, merge=merge) for merge in ("apt", "resizing", "random")]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: range(4)[x[0].long()],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_every_kind_of_synchronization_is_counted(call):
    x = torch.arange(4.0)
    with host_reads() as found:
        call(x)
    assert found


def test_work_on_the_device_is_not_counted():
    x = torch.arange(4.0)
    with host_reads() as found:
        torch.repeat_interleave(x, torch.arange(4), output_size=6) + F.relu(x)[x.long()].sum()
    assert not found


@pytest.mark.parametrize("scorer", ["entropy", "laplacian", "upsample_mse"])
@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True), dict(padding="drop", **WINDOWS)])
@pytest.mark.parametrize("mode", MODES, ids=[mode["merge"] for mode in MODES])
def test_a_forward_synchronizes_once(mode, options, scorer):
    model = tiny(**mode, **options, scorer=scorer)
    images = F.pad(pictures(2, 128, 96), (0, 32))
    with torch.no_grad():
        model(images)  # fills what is kept per image size
        with host_reads() as found:
            model(images)
    assert found == ["tolist"]


def test_without_merging_and_without_padding_to_look_for_there_is_no_synchronization():
    model, images = tiny(**WINDOWS), pictures(2, 128, 96)
    model(images)
    with host_reads() as found:
        model(images)
    assert found == []


def test_a_training_step_synchronizes_once():
    model, images = freeze_host(tiny(thresholds=THRESHOLDS, **WINDOWS)), pictures(2, 128, 128)
    model(images)
    with host_reads() as found:
        model(images)[0].square().mean().backward()
    assert found == ["tolist"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True), dict(padding="drop", **WINDOWS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_behind_the_layout_synchronizes(options, dtype, monkeypatch):
    model = freeze_host(tiny(thresholds=THRESHOLDS, **options)).cuda().to(dtype)
    images = F.pad(pictures(2, 128, 96), (0, 32)).cuda()
    model(images)
    layout = model.layout(images)
    monkeypatch.setattr(model, "layout", lambda images: layout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images)[0].square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
