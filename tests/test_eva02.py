"""The trunk equals the original networks and timm when nothing merges, and itself in every other way of running."""

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_backbones import APTEva02, PatchLayout, convert_eva02, freeze_host, load_converted
from apt_backbones.block import _keep
from apt_backbones.rotary import rotary_table
from apt_backbones.selection import normalize, undo_normalization
from tests.golden import load_golden, relative_error

TINY = dict(img_size=128, embed_dim=48, depth=4, num_heads=3, pretrain_img_size=64)
WINDOWS = dict(window_size=4, global_blocks=(1, 3))
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    model = APTEva02(**{**TINY, **options}).eval()
    if model.adaptive_embed.merge == "apt" and model.thresholds:
        torch.nn.init.normal_(model.adaptive_embed.zero_mlp.weight, std=0.1)
    return model


def pictures(*shape, seed=0):
    """Normalised images, smooth on the left and busy on the right."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.full((shape[0], 3, *shape[1:]), 90.0)
    busy = torch.rand(shape[0], 3, shape[1], shape[2] - shape[2] // 2, generator=generator) * 255
    pixels[..., shape[2] // 2 :] = busy
    return (pixels.round() - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def original_trunk(name, kind, **options):
    golden = load_golden(name)
    prefix = {"det": "backbone.net.", "seg": "backbone."}[kind]
    trunk = {k: v for k, v in golden.weights.items() if k.startswith(prefix) and ".fpn" not in k}
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    model = APTEva02(**{key: golden.config[key] for key in keys}, **options).eval()
    converted = convert_eva02(trunk, kind)
    load_converted(model, {k.removeprefix("backbone."): v for k, v in converted.items()})
    return model, golden.arrays


@pytest.mark.parametrize("thresholds", [None, {32: 0.0}, {32: 0.0, 64: 0.0}])
def test_equals_the_original_detection_trunk(thresholds):
    model, arrays = original_trunk(
        "eva02_det_tiny", "det", window_size=4, global_blocks=(1, 3), pretrain_img_size=64, thresholds=thresholds
    )
    with torch.no_grad():
        (last,) = model(arrays["input"])
    assert relative_error(last, arrays["last_feat"]) <= 1e-4


@pytest.mark.parametrize("thresholds", [None, {32: 0.0}])
def test_equals_the_original_segmentation_trunk(thresholds):
    model, arrays = original_trunk(
        "eva02_seg_tiny", "seg", pretrain_img_size=96, use_cls_token=True, out_indices=(2, 3), thresholds=thresholds
    )
    with torch.no_grad():
        third, fourth = model(arrays["input"])
    assert relative_error(third, arrays["feature/2"]) <= 1e-4  # the x1 map is the trunk's own
    assert relative_error(F.max_pool2d(fourth, 2), arrays["feature/3"]) <= 1e-4


@pytest.mark.parametrize("side", [224, 196])
@pytest.mark.parametrize("thresholds", [None, {28: 0.0}])
def test_equals_timm(side, thresholds):
    host = timm.create_model("eva02_base_patch14_224", img_size=side, num_classes=0, depth=3).eval()
    for parameter in host.parameters():  # timm starts CLS tokens, biases and norms at constants
        torch.nn.init.normal_(parameter, std=0.05)
    model = APTEva02(
        img_size=side,
        patch_size=14,
        embed_dim=768,
        depth=3,
        num_heads=12,
        pretrain_img_size=side,
        use_cls_token=True,
        out_indices=(1, 2),
        thresholds=thresholds,
    ).eval()
    own = set(model.state_dict())
    load_converted(model, {k: v for k, v in host.state_dict().items() if k in own})
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = host.forward_intermediates(images, indices=[1, 2], intermediates_only=True)
        for ours, theirs in zip(model(images), expected):
            assert relative_error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True)])
def test_infinite_thresholds_make_every_patch_the_largest(options):
    model = tiny(thresholds={32: math.inf, 64: math.inf}, **options)
    with torch.no_grad():
        (feature_map,) = model(pictures(2, 128, 192))
    assert model.last_layout.num_patches == (6, 6)
    blocks = feature_map.unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(blocks, blocks[..., :1, :1].expand_as(blocks)), "each 4 x 4 block of cells is one token"


@settings(max_examples=15)
@given(
    height=st.integers(1, 160),
    width=st.integers(1, 160),
    merge=st.sampled_from(["apt", "resizing", "random"]),
    options=st.sampled_from([WINDOWS, {}, dict(use_cls_token=True)]),
    seed=st.integers(0, 100),
)
def test_a_batch_equals_its_images_alone(height, width, merge, options, seed):
    model = tiny(thresholds={32: 6.0, 64: 5.0}, merge=merge, out_indices=(0, 3), **options)
    images = torch.cat([pictures(1, height, width, seed=seed), torch.randn(1, 3, height, width)])
    with torch.no_grad():
        batch = model(images)
        for index, image in enumerate(images):
            for together, alone in zip(batch, model(image[None])):
                torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=0)
                assert alone.shape[2:] == (-(-height // 16), -(-width // 16))


def test_a_rectangle_equals_the_padded_square_less_its_padding():
    """Positions are those of the square's top-left part; padding changes a result only through attention."""
    model = tiny(window_size=2)  # all blocks windowed, and the rectangle ends on a window's edge
    rectangle = pictures(1, 64, 128)
    square = F.pad(rectangle, (0, 0, 0, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(square)[0][:, :, :4], model(rectangle)[0], atol=1e-5, rtol=0)


@settings(max_examples=10)
@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    options=st.sampled_from([WINDOWS, {}, dict(use_cls_token=True)]),
    thresholds=st.sampled_from([None, {32: 0.0}]),
)
def test_with_padding_dropped_a_padded_square_equals_its_rectangle(height, width, options, thresholds):
    model = tiny(padding="drop", thresholds=thresholds, **options)
    rectangle = pictures(2, height * 16, width * 16)
    square = F.pad(rectangle, (0, 128 - width * 16, 0, 128 - height * 16))
    with torch.no_grad():
        expected = F.pad(model(rectangle)[0], (0, 8 - width, 0, 8 - height))
        torch.testing.assert_close(model(square)[0], expected, atol=1e-5, rtol=0)
    assert model.last_layout.num_patches == (height * width, height * width)


@pytest.mark.parametrize("merge", ["apt", "resizing", "random"])
def test_dropping_padding_removes_only_patches_without_content(merge):
    images = F.pad(pictures(1, 128, 56), (0, 72))
    counts = {}
    for padding in ("coarsest", "drop"):
        model = tiny(thresholds={32: 4.0, 64: 4.0}, padding=padding, merge=merge, **WINDOWS)
        layout = model.layout(images)
        counts[padding] = layout.num_patches[0]
        if merge != "random":
            covered = layout.token_BHW[0] >= 0
            assert covered[:, :4].all(), "cells with content have tokens"
            assert covered[:, 4:].any() == (padding == "coarsest")
    assert counts["drop"] < counts["coarsest"]


def test_a_patch_that_reaches_into_padding_is_kept_whole():
    model = tiny(padding="drop", thresholds={32: math.inf})
    images = F.pad(pictures(1, 128, 40), (0, 88))  # two and a half cells
    assert model.select(images)[0, 0].tolist() == [32] * 4 + [0] * 4


def test_content_is_told_from_padding_by_any_channel():
    pixels = torch.tensor([128.0, 40, 40])[:, None, None].expand(1, 3, 32, 32)
    mean = (128.0, 116.28, 103.53)  # red is zero after normalization
    images = F.pad(normalize(pixels, mean, STD.tolist()), (0, 32))
    assert tiny(padding="drop", pixel_mean=mean).select(images)[0, 0].tolist() == [16, 16, 0, 0]


def test_random_keeps_no_cell_of_padding_and_as_many_as_there_are_patches():
    images = F.pad(pictures(1, 128, 56), (0, 72))
    options = dict(padding="drop", thresholds={32: 4.0}, **WINDOWS)
    apt, random = (tiny(merge=merge, **options).layout(images) for merge in ("apt", "random"))
    assert random.num_patches == apt.num_patches and random.column_T.max() < 4


def test_an_image_of_nothing_but_padding_keeps_one_token():
    model = tiny(padding="drop", thresholds={32: 4.0})
    assert model(torch.zeros(2, 3, 64, 64))[0].isfinite().all()
    assert model.last_layout.num_patches == (1, 1)


def test_larger_images_interpolate_positions():
    model = tiny()
    with torch.no_grad():
        side = model.positions((12, 12))
        expected = F.interpolate(
            model.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(12, 12), mode="bicubic"
        )
    torch.testing.assert_close(side, expected, atol=1e-6, rtol=0)
    assert model(torch.randn(1, 3, 100, 192))[0].shape == (1, 48, 7, 12)
    layout = PatchLayout.dense(1, (7, 12), 16)
    assert torch.equal(model.rotations(layout)[0], rotary_table(layout, 16, length=12))


def test_images_smaller_than_a_patch_are_padded_with_zeros():
    model = tiny(thresholds={32: 5.0})
    image = pictures(1, 5, 9)
    with torch.no_grad():
        assert torch.equal(model(image)[0], model(F.pad(image, (0, 7, 0, 11)))[0])
    assert model(image)[0].shape == (1, 48, 1, 1)


def test_selection_does_not_depend_on_float_error():
    """Normalising in another order moves pixels by 1e-5; they are rounded back before they are scored."""
    pixels = torch.arange(256.0).expand(1, 3, 1, 256)
    once = normalize(pixels, MEAN.tolist(), STD.tolist())
    again = pixels * (1 / STD.view(3, 1, 1)) - (MEAN / STD).view(3, 1, 1)
    assert not torch.equal(once, again)
    for images in (once, again):
        assert torch.equal(undo_normalization(images, MEAN.tolist(), STD.tolist()), pixels)


def test_float32_images_are_scored_before_a_half_precision_model_rounds_them():
    """Of 55 grey values bfloat16 leaves 35 apart."""
    pixels = torch.randint(200, 255, (1, 1, 64, 64)).expand(1, 3, 64, 64)
    model = tiny(thresholds={32: 5.4}, pixel_mean=[0.0] * 3, pixel_std=[100.0] * 3)
    images = pixels / 100
    assert model.layout(images).num_patches == (16,) and model.layout(images.bfloat16()).num_patches == (4,)
    model.bfloat16()(images)
    assert model.last_layout.num_patches == (16,)


def test_training_with_checkpointing_gives_the_same_gradients():
    images = pictures(2, 128, 128)
    gradients = []
    for with_cp in (False, True):
        model = tiny(thresholds={32: 6.0}, with_cp=with_cp, **WINDOWS)
        model(images)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_model_that_ran_in_inference_mode_can_still_train():
    images = pictures(1, 112, 96)  # a size that no other test uses: layouts are kept per size
    for options in ({}, dict(thresholds={32: 6.0}), dict(thresholds={32: 6.0}, map_fill="interpolate", map_scale=2)):
        model = tiny(**options, **WINDOWS)
        with torch.inference_mode():
            model(images)
        model(images)[0].sum().backward()
        assert model.patch_embed.proj.weight.grad.isfinite().all()


@settings(max_examples=10)
@given(
    thresholds=st.fixed_dictionaries({32: st.sampled_from([0.0, 4.0, 7.9]), 64: st.sampled_from([0.0, 4.0, 7.9])}),
    seed=st.integers(0, 50),
    options=st.sampled_from([WINDOWS, dict(use_cls_token=True)]),
)
def test_every_trainable_parameter_gets_a_finite_gradient(thresholds, seed, options):
    model = tiny(thresholds=thresholds, **options)
    freeze_host(model)
    model(pictures(2, 128, 128, seed=seed))[0].square().mean().backward()
    merged = any(len(index) for size, index in model.last_layout.sizes.items() if size > 16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert bool(parameter.grad.any()) == merged, name


def test_freezing_leaves_only_the_new_layers_trainable_and_the_host_in_eval_mode():
    model = freeze_host(tiny(thresholds={32: 6.0}, drop_path_rate=0.5, **WINDOWS)).train()
    trainable = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"conv_down", "zero_mlp"}
    assert model.training and model.adaptive_embed.conv_down.training and not model.blocks[3].training
    images = pictures(2, 128, 128)
    assert torch.equal(model(images)[0], model(images)[0]), "no drop path in frozen blocks"
    with pytest.raises(ValueError, match="nothing to train"):
        freeze_host(tiny())


def test_drop_path_drops_whole_images_and_keeps_as_many_as_it_says():
    model = tiny(drop_path_rate=0.25).train()
    layout = model.layout(pictures(400, 32, 32))
    keep_T1 = _keep(model.blocks[-1].drop_path1, layout, torch.float32)
    keep_B1 = torch.stack([part.unique() for part in layout.split(keep_T1)])
    values, counts = keep_B1.unique(return_counts=True)
    assert keep_B1.shape == (400, 1) and values.tolist() == pytest.approx([0, 1 / 0.75])
    assert 270 < counts[1] < 330


def test_random_drops_as_many_tokens_as_apt_merges_away():
    images = pictures(2, 128, 128)
    counts = []
    for merge in ("apt", "random"):
        model = tiny(thresholds={32: 6.0, 64: 5.0}, merge=merge, **WINDOWS)
        with torch.no_grad():
            assert model(images)[0].isfinite().all()
        counts.append(model.last_layout.num_patches)
    assert counts[0] == counts[1] and max(counts[0]) < 64
    assert set(model.last_layout.side_T.tolist()) == {16}


@pytest.mark.gpu
@pytest.mark.parametrize("merge", ["apt", "resizing", "random"])
@pytest.mark.parametrize("options", [WINDOWS, dict(use_cls_token=True), dict(padding="drop", **WINDOWS)])
def test_a_forward_waits_for_the_gpu_once_and_equals_the_cpu(merge, options):
    model = tiny(thresholds={32: 6.0, 64: 5.0}, merge=merge, **options)
    images = F.pad(pictures(2, 128, 96), (0, 32))
    with torch.no_grad():
        expected = model(images)[0]
        layout = model.last_layout
        model.cuda()
        on_gpu = images.cuda()
        model(on_gpu)  # fills what is kept per image size
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            feature_map = model(on_gpu)[0]
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1
    assert torch.equal(model.last_layout.token_BHW.cpu(), layout.token_BHW)
    assert relative_error(feature_map.cpu(), expected) <= 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window_size=3, thresholds={32: 1.0}), r"window side of 3 cells \(48 pixels\).*largest patch, 32 pixels"),
        (dict(window_size=-2, thresholds={32: 1.0}), "window side of -2 cells"),
        (dict(thresholds={64: 1.0}), r"must be \[32\]"),
        (dict(thresholds={32: math.nan}), "nan"),
        (dict(scorer="variance"), "entropy, laplacian, upsample_mse"),
        (dict(merge="mean", thresholds={32: 1.0}), r"apt, .*resizing, random"),
        (dict(rope_position="middle"), "center, corner"),
        (dict(padding="keep"), "coarsest, drop"),
        (dict(map_fill="interpolate", map_scale=0), "map_scale=.* at least 1"),
        (dict(attention_backend="xformers"), "flash, varlen, sdpa"),
        (dict(global_blocks=(4,)), r"global_blocks \(4,\) name blocks outside 0..3"),
        (dict(out_indices=(7,)), "out_indices"),
        (dict(num_heads=5), "multiple of 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        (torch.full((1, 3, 32, 32), math.nan), ValueError, r"images \[0\].*NaN or infinite"),
    ],
)
@pytest.mark.parametrize("merge", ["apt", "random"])
def test_bad_images_are_refused(images, error, message, merge):
    """As score_patches refuses them (tests/test_scores.py), and those that are not finite by their index."""
    with pytest.raises(error, match=message):
        tiny(thresholds={32: 5.0}, merge=merge)(images)


def padded_and_masked(model, images):
    """The same tokens as a padded batch with masks: what packing must equal. Written for window_size=None."""
    layout = model.layout(images)
    tokens = model._embed(images, layout)
    rope = model.rotations(layout)[0]
    longest = layout.images.max_length
    for block in model.blocks:
        normed = block.norm1(tokens)
        attn = block.attn
        q, k, v = (p(normed).unflatten(-1, (attn.num_heads, -1)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        sign = torch.tensor([-1.0, 1.0]).repeat(8)
        swap = torch.arange(16).view(8, 2).flip(1).flatten()
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (rope.real, rope.imag))
        q, k = (x * cos + x[..., swap] * sign * sin for x in (q, k))
        pad = lambda x: torch.nn.utils.rnn.pad_sequence(x.split(layout.images.lengths), True).transpose(1, 2)  # noqa: E731
        mask = torch.arange(longest) < torch.tensor(layout.images.lengths)[:, None]
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask[:, None, None]).transpose(1, 2)
        tokens = tokens + attn.proj(out[mask].flatten(1))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return layout.to_map(tokens)


@pytest.mark.parametrize("use_cls_token", [True, False])
def test_packed_equals_padded_and_masked(use_cls_token):
    model = tiny(thresholds={32: 6.0, 64: 4.0}, use_cls_token=use_cls_token)
    images = torch.cat([pictures(2, 128, 96), pictures(1, 128, 96, seed=1).flip(3) * 0.2])
    with torch.no_grad():
        (feature_map,) = model(images)
        assert len(set(model.last_layout.num_patches)) > 1
        torch.testing.assert_close(feature_map, padded_and_masked(model, images), atol=1e-5, rtol=0)


def test_an_untrained_apt_trunk_is_the_resizing_trunk():
    torch.manual_seed(0)
    apt = APTEva02(**TINY, **WINDOWS, thresholds={32: 5.0}).eval()
    resizing = APTEva02(**TINY, **WINDOWS, thresholds={32: 5.0}, merge="resizing").eval()
    resizing.load_state_dict({k: v for k, v in apt.state_dict().items() if "adaptive_embed" not in k})
    images = pictures(2, 128, 128)
    with torch.no_grad():
        assert torch.equal(apt(images)[0], resizing(images)[0])
    assert apt.last_layout.num_patches[0] < 64
