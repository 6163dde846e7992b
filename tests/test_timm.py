"""Every timm family that ``adapt`` takes: timm itself when nothing merges, and consistent when patches merge."""

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from apt_backbones import adapt, freeze_host
from apt_backbones.new_layers import save_new_layers
from apt_backbones.resample import _matrix
from tests.golden import relative_error

FAMILIES = [
    "vit_tiny_patch16_224",  # augreg; DeiT and MAE share its architecture
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "eva_large_patch14_196",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
]


def build(name, **options):
    """Two blocks of a timm model with random weights everywhere (timm starts some at constants that hide mistakes)."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=5, dynamic_img_size=True, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.02 if parameter.ndim > 1 else 0.5, 0.05)
    return model


def thresholds_of(model, *values):
    """Thresholds for twice and four times the patch."""
    patch = model.patch_embed.patch_size[0]
    return {patch * 2 ** (index + 1): value for index, value in enumerate(values)}


def pictures(model, batch, rows, columns, seed=0):
    """Images of whole base patches, smooth on the left and busy on the right."""
    patch = model.patch_embed.patch_size[0]
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((batch, 3, rows * patch, columns * patch), 0.1)
    busy = images[..., images.shape[3] // 2 :]
    busy.copy_(torch.randn(busy.shape, generator=generator))
    return images


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [(14, 14), (9, 6)])
def test_equals_timm_when_nothing_merges(name, grid):
    model = build(name)
    images = pictures(model, 2, *grid)
    with torch.no_grad():
        logits = model(images)
        features, (first, last) = model.forward_intermediates(images, indices=2, norm=True)
        adapt(model, thresholds_of(model, 0.0, 0.0))
        assert relative_error(model(images), logits) <= 1e-5
        ours, (our_first, our_last) = model.forward_intermediates(images, indices=2, norm=True)
    for own, timms in ((ours, features), (our_first, first), (our_last, last)):
        assert relative_error(own, timms) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(num_kv_heads=2)])
@pytest.mark.parametrize("freeze", [False, True])
def test_separate_projections_equal_timms(options, freeze):
    model = build("vit_small_patch16_rope_224", qkv_fused=False, attn_type="rope", **options)
    images = pictures(model.requires_grad_(not freeze), 2, 9, 6)
    expected = model(images)
    assert relative_error(adapt(model, {32: 0.0})(images), expected) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_merges_each_image_for_itself(name):
    model = build(name)
    adapt(model, thresholds_of(model, 3.0, 3.0))
    nn.init.normal_(model.adaptive_embed.zero_mlp.weight, std=0.02)
    images = torch.cat(
        [
            pictures(model, 1, 9, 12),
            pictures(model, 1, 9, 12, seed=1).flip(3),
            torch.zeros_like(pictures(model, 1, 9, 12)),
        ]
    )
    logits = model(images)
    assert logits.isfinite().all()
    num_patches = model.last_layout.num_patches
    assert num_patches[2] < num_patches[0] < 9 * 12
    for image in range(3):
        assert relative_error(model(images[image : image + 1]), logits[image : image + 1]) <= 1e-5
    logits.square().sum().backward()
    for parameter_name, parameter in model.adaptive_embed.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, parameter_name


@torch.no_grad()
def test_maps_are_interpolated_within_merged_patches_if_wanted():
    model = build("vit_small_patch14_dinov2")
    images = torch.cat([pictures(model, 1, 9, 12), torch.zeros_like(pictures(model, 1, 9, 12))])
    adapt(model, thresholds_of(model, 3.0, 3.0))
    (repeated,), tokens = model.feature_maps(images, [-1], norm=True), model.forward_features(images)
    adapt(model, thresholds_of(model, 3.0, 3.0), map_fill="interpolate")
    (filled,) = model.feature_maps(images, [-1], norm=True)
    expected = model.last_layout.interpolate(repeated)
    assert torch.equal(filled, expected) and not torch.equal(filled, repeated)
    assert torch.equal(model.forward_intermediates(images, [-1], norm=True, intermediates_only=True)[0], expected)
    assert torch.equal(model.forward_features(images), tokens), "tokens are repeated; pooling counts them by their area"
    with pytest.raises(ValueError, match="unknown map_fill 'nearest'; choose one of repeat, interpolate"):
        adapt(model, thresholds_of(model, 3.0), map_fill="nearest")


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 3.0])
def test_maps_finer_than_the_patches_keep_their_means(threshold):
    model = build("vit_small_patch14_dinov2")
    images = pictures(model, 1, 9, 12)
    thresholds = None if threshold is None else thresholds_of(model, threshold)
    adapt(model, thresholds, padding="coarsest")
    (coarse,) = model.feature_maps(images, [-1])
    adapt(model, thresholds, map_fill="learned", map_scale=2)
    (fine,) = model.feature_maps(images, [-1])
    assert fine.shape[2:] == (18, 24) and model.forward_features(images).shape[1] == model.num_prefix_tokens + 9 * 12
    base = model.last_layout.side_T[model.last_layout.token_BHW] == model.patch_size
    torch.testing.assert_close(
        F.avg_pool2d(fine, 2).movedim(1, 3)[base], coarse.movedim(1, 3)[base], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model.forward_intermediates(images, [-1], intermediates_only=True)[0], fine)
    with pytest.raises(ValueError, match='map_scale=2 needs map_fill="interpolate" or "learned"'):
        adapt(model, thresholds, map_scale=2)


def test_learned_maps_start_interpolated_and_change_merged_patches_only():
    model = build("vit_small_patch14_dinov2")
    images = torch.cat([pictures(model, 1, 9, 12), torch.zeros_like(pictures(model, 1, 9, 12))])
    options = dict(merge="resizing", out_indices=(0, -1))
    adapt(model, thresholds_of(model, 3.0, 3.0), map_fill="interpolate", **options)
    interpolated = model.feature_maps(images)
    adapt(model, thresholds_of(model, 3.0, 3.0), map_fill="learned", **options)
    assert list(model.map_detail) == ["0", "1"]
    for learned, expected in zip(model.feature_maps(images), interpolated):
        torch.testing.assert_close(learned, expected)
    freeze_host(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"map_detail.{name}" for name, _ in model.map_detail.named_parameters()
    }
    for layer in model.map_detail.values():
        nn.init.normal_(layer.out.weight)
    learned, layout = model.feature_maps(images), model.last_layout
    learned[0].square().sum().backward()
    assert model.map_detail["0"].down.weight.grad.any() and model.map_detail["1"].down.weight.grad is None
    for of_map, before in zip(learned, interpolated):
        change = (of_map - before).detach().permute(0, 2, 3, 1)
        merged = layout.side_T[layout.token_BHW] > model.patch_size
        assert change[merged].abs().amax(1).min() > 0 and not change[~merged].any()
        patches = change[:, :8, :12].unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).mean((2, 4))
        assert patches.abs().max() < 1e-4 * change.abs().max(), "each patch keeps its mean"
    model.map_fill = "interpolate"
    assert all(torch.equal(now, before) for now, before in zip(model.feature_maps(images), interpolated))
    model.map_fill, weights = "learned", model.map_detail["0"].out.weight.clone()
    model.thresholds = thresholds_of(model, 0.0, 0.0)
    dense = timm_maps(model, images)
    for learned, expected in zip(model.feature_maps(images), dense):
        assert relative_error(learned, expected) <= 1e-5, "where nothing merges"
    adapt(model, thresholds_of(model, 2.0), map_fill="learned", **options)
    assert torch.equal(model.map_detail["0"].out.weight, weights), "layers outlive other settings"


def timm_maps(model, images):
    original = adapt(deepcopy(model), None)
    return original.forward_intermediates(images, [0, 1], intermediates_only=True)


def test_thresholds_none_gives_timms_own_model_back():
    model = build("vit_small_patch16_dinov3")
    names, kind = list(model.state_dict()), type(model)
    adapt(model, thresholds_of(model, 3.0))
    assert set(model.state_dict()) - set(names) and isinstance(model, kind)
    assert adapt(model, thresholds=None) is model
    assert type(model) is kind and list(model.state_dict()) == names and "thresholds" not in vars(model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_the_image_size_may_be_set_and_the_patch_size_not(name):
    model = adapt(build(name), thresholds_of(build(name), 0.0))
    patch = model.patch_size
    model.set_input_size(img_size=(6 * patch, 8 * patch), patch_size=(patch, patch))
    images = pictures(model, 1, 6, 8)
    found = model.forward_features(images)
    torch.testing.assert_close(found, adapt(model, None).forward_features(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="an adapted model keeps its patch size"):
        adapt(model, {2 * patch: 0.0}).set_input_size(patch_size=(patch // 2, patch // 2))


@pytest.mark.parametrize(
    "settings", [dict(thresholds={30: 5.0}), dict(scorer="nowhere.safetensors"), dict(window_size=1)]
)
def test_a_refused_setting_leaves_timms_own_model(settings):
    model = build("vit_tiny_patch16_224")
    kind, attributes = type(model), set(vars(model))
    with pytest.raises((ValueError, FileNotFoundError)):
        adapt(model, **{"thresholds": {32: 5.0}, **settings})
    assert type(model) is kind and set(vars(model)) == attributes and "adaptive_embed" not in model._modules
    adapt(model, {32: 5.0})(pictures(model, 1, 4, 4))


@pytest.mark.parametrize("settings", [dict(thresholds={48: 5.0}), dict(scorer="nowhere.safetensors")])
def test_a_refused_setting_leaves_an_adapted_model_as_it_is(settings):
    model = adapt(build("vit_tiny_patch16_224"), {32: 5.0}, adapter_rank=2)
    model.set_grad_checkpointing()
    for part in (*model.adaptive_embed.parameters(), *model.token_adapters.parameters()):
        nn.init.normal_(part)
    images = pictures(model, 1, 4, 4)
    expected, weights = model(images), deepcopy(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError)):
        adapt(model, **{"thresholds": {32: 4.0}, **settings})
    assert torch.equal(model(images), expected) and model.thresholds == {32: 5.0} and model.grad_checkpointing
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_of_a_file_take_the_place_of_those_of_an_adapted_model(tmp_path):
    model = adapt(build("vit_tiny_patch16_224"), {32: 5.0})
    save_new_layers(model, tmp_path / "new.safetensors")
    saved = deepcopy(model.adaptive_embed.state_dict())
    nn.init.normal_(model.adaptive_embed.zero_mlp.weight)
    adapt(model, {32: 5.0}, new_layers=str(tmp_path / "new.safetensors"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.adaptive_embed.state_dict().items())


def test_another_way_to_merge_starts_as_that_way_does():
    model = adapt(build("vit_tiny_patch16_224"), {32: 5.0})
    assert adapt(model, {32: 5.0}, merge="apt_random_init").adaptive_embed.zero_mlp.weight.any()
    assert not adapt(model, {32: 5.0}, merge="apt").adaptive_embed.zero_mlp.weight.any()


def test_fused_weights_are_given_back_when_settings_change():
    model = freeze_host(adapt(build("eva02_base_patch14_224"), {28: 5.0}))
    for thresholds in ({28: 4.0}, None):
        model(pictures(model, 1, 4, 4))
        storages = [part.untyped_storage().data_ptr() for part in adapt(model, thresholds).parameters()]
        assert len(set(storages)) == len(storages)


def test_without_positions_there_is_no_dropout_of_them():
    model = build("vit_tiny_patch16_224", pos_embed="none", pos_drop_rate=0.9).train()
    images = pictures(model, 2, 4, 4)
    torch.testing.assert_close(model(images), adapt(model, {32: 0.0})(images))


@pytest.mark.parametrize("thresholds", [{28: 3.0}, None])
def test_without_prefix_tokens_there_are_maps_and_no_pooled_features(thresholds):
    model = adapt(build("vit_small_patch14_reg4_dinov2"), thresholds, keep_prefix=False)
    images = pictures(model, 1, 6, 8)
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape == (1, 384, 6, 8)
    with pytest.raises(ValueError, match="keep_prefix=False is for feature maps"):
        model(images)


@torch.no_grad()
def test_images_may_be_smaller_than_the_largest_patch():
    model = build("vit_tiny_patch16_224")
    images = pictures(model, 1, 3, 2)
    expected = model(images)
    assert relative_error(adapt(model, {32: 0.0, 64: 9.0, 128: 9.0})(images), expected) <= 1e-5


@torch.no_grad()
def test_what_timms_convolution_leaves_out_of_an_image_is_left_out():
    """384 pixels are 27 patches of 14 and 6 pixels more."""
    model = timm.create_model("vit_so400m_patch14_siglip_384", depth=1, embed_dim=32, num_heads=2).eval()
    images = torch.randn(1, 3, 384, 384)
    expected = model.forward_features(images)
    assert expected.shape[1] == 27 * 27
    assert torch.equal(adapt(model, {28: 0.0}).forward_features(images), expected)


@torch.no_grad()
def test_low_rank_additions_to_the_patch_projection_act_on_merged_patches():
    model = adapt(build("vit_tiny_patch16_224"), {32: 5.5})
    images = pictures(model, 1, 4, 4)
    expected = model(images)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["patch_embed.proj"]))
    torch.testing.assert_close(adapted(images), expected)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    added = adapted(images)
    assert not torch.allclose(added, expected)
    assert 0 < model.last_layout.is_merged_T1.sum() < model.last_layout.num_tokens
    torch.testing.assert_close(adapted.merge_and_unload()(images), added, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_of_the_default_dtype_runs_and_leaves_nothing_behind():
    model = adapt(build("vit_tiny_patch16_224"), {32: 5.5})
    images = pictures(model, 1, 6, 10)
    expected = model(images)
    for dtype in (torch.float64, torch.bfloat16):
        _matrix.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            assert relative_error(model(images), expected) < 1e-5
        finally:
            torch.set_default_dtype(torch.float32)
        assert relative_error(model(images), expected) < 1e-5


@pytest.mark.parametrize(
    "name, reason",
    [
        ("samvit_base_patch16", "relative position"),
        ("beit_base_patch16_224", "relative position"),
        ("vit_relpos_small_patch16_224", "relative position"),
        ("swin_tiny_patch4_window7_224", "hierarchical|relative position"),
        ("hiera_tiny_224", "plain ViTs"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_small_r26_s32_224", "HybridEmbed"),
    ],
)
def test_says_why_a_network_does_not_fit(name, reason):
    with pytest.raises(TypeError, match=reason):
        adapt(timm.create_model(name, num_classes=0), {32: 5.5})
