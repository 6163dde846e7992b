"""Low-rank layers for merged patches' tokens: what they add, and that all else stays as it was pretrained."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from apt_backbones import adapt
from apt_backbones.block import projections_of
from apt_backbones.new_layers import load_new_layers, save_new_layers
from tests.test_adding_a_backbone import AdaptiveTorchvision, vit  # noqa: F401, a fixture
from tests.test_timm import FAMILIES, build, pictures, thresholds_of


def trained(model):
    """The model with adapters that are no longer zero."""
    for name, parameter in model.named_parameters():
        if "token_adapters" in name:
            nn.init.normal_(parameter, 0, 0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_they_start_at_zero_and_change_nothing_where_nothing_merges(name):
    model = build(name)
    images, thresholds = pictures(model, 2, 8, 8), thresholds_of(model, 1.0)
    adapt(model, thresholds, merge="resizing")
    expected = model(images)
    adapt(model, thresholds, merge="resizing", adapter_rank=3)
    assert torch.equal(model(images), expected)
    trained(model)
    assert not torch.equal(model(images), expected)
    model.thresholds = dict.fromkeys(thresholds, 0.0)
    without_merging = model(images)
    adapt(model, dict.fromkeys(thresholds, 0.0), merge="resizing")
    assert torch.equal(model(images), without_merging)


@torch.inference_mode()
def test_an_image_in_which_nothing_merges_does_not_mind_its_neighbour():
    model = build("vit_tiny_patch16_224")
    trained(adapt(model, thresholds_of(model, 1.0), merge="resizing", adapter_rank=3))
    smooth, busy = pictures(model, 1, 8, 8), torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(model(torch.cat([smooth, busy])), torch.cat([model(smooth), model(busy)]))
    assert model.last_layout.num_tokens == 65, "the busy image, and its CLS token"
    torch.testing.assert_close(model(busy), adapt(deepcopy(model), None)(busy))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
@torch.inference_mode()
def test_where_all_tokens_are_merged_they_are_a_change_of_the_weights(name):
    model = build(name)
    side = 8 * model.patch_embed.patch_size[0]
    images = torch.randn(2, 3, side, side)
    adapt(model, thresholds_of(model, float("inf")), merge="resizing", keep_prefix=False, adapter_rank=3)
    trained(model)
    for adapter in model.token_adapters:
        adapter.mlp.up.weight.zero_()
    expected = model.feature_maps(images)
    for block, adapter in zip(model.blocks, model.token_adapters):
        layers = projections_of(block)
        change = adapter.qkv.up.weight @ adapter.qkv.down.weight
        for layer, part in zip(layers, change.split([layer.out_features for layer in layers])):
            layer.weight += part
        adapter.qkv.up.weight.zero_()
    assert model.last_layout.num_patches == (16, 16)
    torch.testing.assert_close(model.feature_maps(images), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_branch_beside_the_mlp_reads_what_the_mlp_reads():
    model = build("vit_tiny_patch16_224")
    images = pictures(model, 1, 8, 8)
    adapt(model, thresholds_of(model, 1.0), merge="resizing", adapter_rank=3)
    seen = []
    model.blocks[-1].norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    *_, (_, before, _) = model.run(images)
    adapter = trained(model).token_adapters[-1]
    for other in (model.token_adapters[0].qkv, model.token_adapters[0].mlp, adapter.qkv):
        other.up.weight.zero_()
    *_, (_, after, layout) = model.run(images)
    merged = layout.is_merged_T1[:, 0]
    assert torch.equal(after[~merged], before[~merged]) and merged.any() and not merged.all()
    torch.testing.assert_close(after[merged] - before[merged], adapter.mlp.up(adapter.mlp.down(seen[0][merged])))


def test_settings_change_and_trained_adapters_stay():
    model = build("vit_tiny_patch16_224")
    trained(adapt(model, thresholds_of(model, 1.0), adapter_rank=3))
    weight = model.token_adapters[1].mlp.down.weight.clone()
    adapt(model, thresholds_of(model, 2.0, 1.0), scorer="laplacian", adapter_rank=3)
    assert torch.equal(model.token_adapters[1].mlp.down.weight, weight)
    adapt(model, thresholds_of(model, 2.0), adapter_rank=2)
    assert not model.token_adapters[1].mlp.up.weight.any(), "of another rank: new ones"
    adapt(model, thresholds_of(model, 2.0))
    assert not model.token_adapters


def test_a_file_says_what_it_is_for(tmp_path):
    model, file = build("vit_tiny_patch16_224"), tmp_path / "adapters.safetensors"
    save_new_layers(adapt(model, thresholds_of(model, 1.0), merge="resizing", adapter_rank=3), file)
    adapt(model, thresholds_of(model, 1.0), merge="resizing")
    with pytest.raises(ValueError, match="merge='resizing', adapter_rank=3, without learned maps"):
        load_new_layers(model, file)
    with pytest.raises(ValueError, match="adapter_rank=-1 must be at least 0"):
        adapt(model, thresholds_of(model, 1.0), adapter_rank=-1)


def test_a_network_that_runs_its_own_blocks_has_none(vit):  # noqa: F811
    with pytest.raises(ValueError, match="AdaptiveTorchvision runs its blocks itself, without adapters"):
        AdaptiveTorchvision(vit, thresholds={16: 5.0}, adapter_rank=4)
