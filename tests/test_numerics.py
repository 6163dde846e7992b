"""Trunks of every kind in other precisions, memory formats and ways of running than the plain one."""

import copy
import io
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from apt_backbones import AdaptiveTrunk, APTEva02, adapt, freeze_host
from tests.golden import relative_error
from tests.processes import preload, run_ranks

preload(__name__)

THRESHOLDS = {32: 5.5, 64: 5.5}


def eva02():
    return APTEva02(
        img_size=128, embed_dim=48, depth=3, num_heads=3, window_size=4, global_blocks=(1,), thresholds=THRESHOLDS
    )


def dinov3():
    model = timm.create_model("vit_small_patch16_dinov3", depth=3, num_classes=0, dynamic_img_size=True)
    return adapt(model, THRESHOLDS)


def augreg():
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0, img_size=128, dynamic_img_size=True)
    return adapt(model, THRESHOLDS)


def made(build, seed=0):
    torch.manual_seed(seed)
    trunk = build().eval()
    nn.init.normal_(trunk.adaptive_embed.zero_mlp.weight, std=0.02)
    return trunk


BUILDS = pytest.mark.parametrize("build", [eva02, dinov3, augreg], ids=lambda build: build.__name__)


@pytest.fixture(params=BUILDS.args[1], ids=BUILDS.kwargs["ids"])
def trunk(request):
    return made(request.param)


def pictures(batch=2, height=128, width=96, seed=0):
    """Pixels of whole numbers, as data pipelines give them; smooth on the left and busy on the right."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.full((batch, 3, height, width), 90.0)
    busy = pixels[..., width // 2 :]
    busy.copy_(torch.randint(0, 256, busy.shape, generator=generator))
    return pixels


def normalized(trunk, pixels):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (trunk.pixel_mean, trunk.pixel_std))
    return (pixels - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_near_float32_and_merges_the_same_patches(trunk, dtype, tolerance):
    images = normalized(trunk, pictures())
    (expected,) = trunk.feature_maps(images)
    layout = trunk.last_layout
    (ours,) = copy.deepcopy(trunk).to(dtype).feature_maps(images)
    assert ours.dtype == dtype and relative_error(ours.float(), expected) <= tolerance
    with torch.autocast("cpu", dtype):
        (mixed,) = trunk.feature_maps(images)
    assert relative_error(mixed.float(), expected) <= tolerance
    assert torch.equal(trunk.last_layout.token_BHW, layout.token_BHW), "selection is always float32's"


@torch.no_grad()
def test_memory_formats_change_nothing(trunk):
    images = normalized(trunk, pictures())
    (expected,) = trunk.feature_maps(images)
    wide = torch.zeros(2, 3, 128, 200)
    wide[..., 50:146] = images
    for other in (images.contiguous(memory_format=torch.channels_last), wide[..., 50:146], images.flip(0).flip(0)):
        assert relative_error(trunk.feature_maps(other)[0], expected) <= 1e-6


def test_every_way_of_keeping_a_model_keeps_its_results(trunk):
    freeze_host(trunk)
    images = normalized(trunk, pictures())
    with torch.inference_mode():
        (expected,) = trunk.feature_maps(images)
    file = io.BytesIO()
    torch.save(trunk, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(trunk, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(trunk)
    average.update_parameters(trunk)
    for twin in (copy.deepcopy(trunk), torch.load(file, weights_only=False), average.module, trunk):
        assert twin.train() is twin and twin.eval() is twin
        (ours,) = twin.feature_maps(images)
        assert relative_error(ours.detach(), expected) <= 1e-6
        ours.square().mean().backward()
        assert twin.adaptive_embed.zero_mlp.weight.grad.any()


class Loss(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images):
        return self.trunk.feature_maps(images)[0].square().mean()


def test_activation_checkpointing_and_ddp_give_the_same_gradients(trunk, tmp_path):
    images = normalized(trunk, pictures())
    gradients = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrap, with_cp in ((lambda x: x, False), (lambda x: x, True), (DistributedDataParallel, True)):
            model = freeze_host(copy.deepcopy(trunk)).train()
            model.with_cp = with_cp
            wrap(Loss(model))(images).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.adaptive_embed.parameters()]))
    finally:
        torch.distributed.destroy_process_group()
    for other in gradients[1:]:
        assert relative_error(other, gradients[0]) <= 1e-6


def _sharded(rank, build, with_cp):
    """Weights and gradients of a sharded trunk that is filled after it has run."""
    torch.distributed.init_process_group("gloo")
    model, others = Loss(freeze_host(made(build, seed=1)).train()), Loss(made(build)).state_dict()
    model.trunk.with_cp = with_cp
    mesh, whole = init_device_mesh("cpu", (2,)), StateDictOptions(full_state_dict=True, cpu_offload=True)
    for block in model.trunk.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images = normalized(model.trunk, pictures(seed=rank))
    model(images).backward()
    assert all(p.to_local().numel() <= (p.numel() + 1) // 2 + p[0].numel() for p in model.trunk.blocks.parameters())
    set_model_state_dict(model, others, options=whole)
    model.zero_grad()
    model(images).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    return get_model_state_dict(model, options=whole), gradients


@BUILDS
@pytest.mark.parametrize("with_cp", [False, True])
def test_a_frozen_trunk_sharded_block_by_block_trains_as_a_whole_one(build, with_cp, tmp_path):
    """As docs/reliability.md has it, in two processes."""
    model = Loss(freeze_host(made(build)).train())
    for rank in range(2):
        (model(normalized(model.trunk, pictures(seed=rank))) / 2).backward()
    (weights, gradients), _ = run_ranks(2, tmp_path, _sharded, build, with_cp)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(gradients.pop(name), parameter.grad) <= 1e-5
    assert not gradients


@torch.no_grad()
def test_the_same_batch_gives_the_same_bits_and_images_do_not_see_each_other(trunk):
    """A batch that mixes an image in which all merges, one in which nothing does, and one of each half."""
    pixels = pictures(3)
    pixels[0] = 128
    pixels[1] = torch.randint(0, 256, (3, 128, 96), generator=torch.Generator().manual_seed(3)).float()
    images = normalized(trunk, pixels)
    (first,) = trunk.feature_maps(images)
    num_patches = trunk.last_layout.num_patches
    assert num_patches[0] < num_patches[2] < num_patches[1] == 48
    assert torch.equal(trunk.feature_maps(images)[0], first)
    for index in range(3):
        assert relative_error(trunk.feature_maps(images[index : index + 1])[0], first[index : index + 1]) <= 1e-5
        assert trunk.last_layout.num_patches == (num_patches[index],)


@torch.no_grad()
def test_rotary_tables_are_finite_at_3072_pixels():
    for build in (eva02, dinov3):
        trunk: AdaptiveTrunk = build().eval()
        layout = trunk.layout(torch.zeros(1, 3, 3072, 3072))
        assert all(torch.view_as_real(rotation).isfinite().all() for rotation in trunk.rotations(layout))


def test_tracing_and_export_say_that_they_are_not_supported(trunk):
    maps, images = Maps(trunk), normalized(trunk, pictures(1))
    trace, export = torch.jit.trace, partial(torch.export.export, strict=False)
    for refused in (trace, export):
        with pytest.raises(
            Exception, match=r"cannot be exported, nor traced while they merge or drop padding: how many tokens"
        ):
            refused(maps, (images,))
    trunk.thresholds = {}
    with torch.no_grad():
        before = maps(images)
    with pytest.raises(Exception, match=r"cannot be exported"):
        export(maps, (images,))  # what is kept for an image size would hold no values
    torch.testing.assert_close(maps(images), before, rtol=0, atol=0)
    torch.testing.assert_close(trace(maps, (images,))(images), before, rtol=0, atol=0)


class Maps(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images):
        return self.trunk.feature_maps(images)[0]


@pytest.mark.slow
def test_memory_stays_flat_over_2000_steps_of_changing_sizes():
    """Resident memory after 2000 training steps is that after 500, and what is kept per image size is bounded."""
    psutil = pytest.importorskip("psutil")
    generator = torch.Generator().manual_seed(0)
    trunk = freeze_host(augreg()).train()
    nn.init.normal_(trunk.adaptive_embed.zero_mlp.weight, std=0.02)
    optimizer = torch.optim.SGD(trunk.adaptive_embed.parameters(), lr=1e-6)
    sizes = torch.randint(1, 9, (2000, 2), generator=generator) * 16
    resident = []
    for step, (height, width) in enumerate(sizes.tolist()):
        images = normalized(trunk, pictures(1, height, max(width, 32), seed=step))
        trunk.feature_maps(images)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 499:
            resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] < resident[0] + 32e6
