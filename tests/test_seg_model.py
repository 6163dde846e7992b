"""Segmentation models: official weights give the original's outputs, and packed sliding equals mmseg's."""

import pickle

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import apt_backbones.mm.seg as seg
from apt_backbones import convert_eva02, load_converted
from tests.golden import load_golden, relative_error

BN = dict(type="BN", requires_grad=True)
CLASSES = 5


def config(width=48, depth=4, size=96, patch=16, test_cfg=None, **backbone) -> ConfigDict:
    """A tiny EVA-02 + UperNet; 96 pixels and the other defaults are those of the golden network."""
    heads = dict(num_classes=CLASSES, norm_cfg=BN, align_corners=False, dropout_ratio=0.1)
    return ConfigDict(
        type="APTEncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", mean=[0, 0, 0], std=[1, 1, 1], size=(size, size)),
        backbone=dict(
            type="APTEva02",
            img_size=size,
            pretrain_img_size=size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=3,
            use_cls_token=True,
            out_indices=tuple(range(depth - 4, depth)),
            **backbone,
        ),
        neck=dict(type="Feature2Pyramid", embed_dim=width, rescales=[4, 2, 1, 0.5], norm_cfg=BN),
        decode_head=dict(type="UPerHead", in_channels=[width] * 4, in_index=[0, 1, 2, 3], channels=16, **heads),
        auxiliary_head=dict(
            type="FCNHead", in_channels=width, in_index=2, channels=8, num_convs=1, concat_input=False, **heads
        ),
        test_cfg=test_cfg or dict(mode="whole"),
    )


def build(**kwargs) -> nn.Module:
    init_default_scope("mmseg")
    model = MODELS.build(config(**kwargs)).eval()
    for module in model.modules():  # as after training: nothing is zero, one or equal by accident
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def heads_of(model: nn.Module) -> dict:
    return {k: v for k, v in model.state_dict().items() if k.startswith(("decode_head", "auxiliary_head"))}


# ------------------------------------------------------------------------------------------- official weights


def test_converted_trunk_and_neck_reproduce_the_original_features():
    golden = load_golden("eva02_seg_tiny")
    whole = build()
    model = nn.ModuleDict({"backbone": whole.backbone, "neck": whole.neck}).eval()
    load_converted(model, convert_eva02(golden.weights, "seg"))  # strict: every key is used and every weight filled
    with torch.no_grad():
        features = model["neck"](model["backbone"](golden.arrays["input"]))
    assert len(features) == 4
    for index, feature in enumerate(features):
        assert relative_error(feature, golden.arrays[f"feature/{index}"]) < 1e-4


def test_converted_model_gives_the_logits_of_mmsegs_own_heads_on_the_original_features():
    golden = load_golden("eva02_seg_tiny")
    official_heads = heads_of(build())  # under the names that mmseg 0.x gave them, too
    model = build()
    load_converted(model, convert_eva02({**golden.weights, **official_heads}, "seg"))

    reference = {name: MODELS.build(config()[name]).eval() for name in ("decode_head", "auxiliary_head")}
    for name, head in reference.items():
        head.load_state_dict({k.removeprefix(f"{name}."): v for k, v in official_heads.items() if k.startswith(name)})
        original_features = [golden.arrays[f"feature/{i}"] for i in range(4)]
        with torch.no_grad():
            expected = head(original_features)
            logits = getattr(model, name)(model.extract_feat(golden.arrays["input"]))
        assert expected.shape[1] == CLASSES
        assert relative_error(logits, expected) < 1e-4


def test_every_key_is_accounted_for():
    golden = load_golden("eva02_seg_tiny")
    weights = {**golden.weights, **heads_of(build())}
    converted = convert_eva02(weights, "seg")
    dropped = [name for name in weights if "rope" in name]
    # Query and value biases of the original come without a key bias, and timm's names keep it that way.
    assert len(converted) == len(weights) - len(dropped)
    assert set(converted) == set(build().state_dict())
    assert converted["neck.upsample_4x.1.num_batches_tracked"] == golden.weights["backbone.fpn1.1.num_batches_tracked"]
    with pytest.raises(ValueError, match=r"not an EVA-02 seg checkpoint: 1 entries \(backbone.fpn3.0.weight\) unknown"):
        convert_eva02({**weights, "backbone.fpn3.0.weight": torch.zeros(1)}, "seg")


# ------------------------------------------------------------------------------------- merged patches' resolution


def read_at_own_resolution(threshold: float, own_resolution: bool = True, **backbone) -> nn.Module:
    """A frozen DINOv3 of four blocks, whose positions are relative to the image, and UperNet."""
    torch.manual_seed(0)
    cfg = config(width=384)
    merging = dict(thresholds={32: threshold, 64: threshold}, merge="resizing", map_fill="interpolate")
    cfg.backbone = dict(
        type="APTTimm", model="vit_small_patch16_dinov3", out_indices=(0, 1, 2, 3), **{**merging, **backbone}
    )
    init_default_scope("mmseg")
    return MODELS.build(ConfigDict(cfg, own_resolution=own_resolution)).eval()


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.encode_decode(images, [dict(img_shape=images.shape[2:])] * len(images))


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("map_fill", ["repeat", "interpolate"])
def test_an_image_that_merges_everywhere_is_read_as_the_smaller_image(factor, map_fill):
    infinite = float("inf")
    merging = dict(thresholds={32: infinite, 64: infinite if factor == 4 else 0.0}, map_fill=map_fill)
    model, dense = read_at_own_resolution(0, **merging), read_at_own_resolution(0, thresholds=None)
    images = torch.randn(2, 3, 256, 384)
    smaller = nn.functional.interpolate(images, scale_factor=1 / factor, mode="bilinear")
    head_says = dense.decode_head(dense.extract_feat(smaller))
    expected = nn.functional.interpolate(head_says, images.shape[2:], mode="bilinear")
    assert relative_error(logits_of(model, images), expected) < 1e-4
    model.own_resolution = False
    assert relative_error(logits_of(model, images), expected) > 0.01, "else nothing is tested"


class MaskClassification(nn.Module):
    """As Mask2FormerHead does, it takes the size of its output from ``pad_shape`` where that is known."""

    def predict(self, maps, metas, test_cfg):
        (meta,) = metas
        return nn.functional.interpolate(maps[-1], meta.get("pad_shape", meta["img_shape"]), mode="bilinear")


@torch.no_grad()
def test_heads_get_the_size_of_what_they_read():
    """Not that of the whole image, of which it is a crop, nor that before padding to whole patches."""
    model = build()
    model.decode_head = MaskClassification()
    images = torch.randn(1, 3, 90, 70)
    whole = dict(img_shape=(90, 70), pad_shape=(200, 300))
    assert torch.equal(model.encode_decode(images, [whole]), logits_of(model, images))


@torch.no_grad()
def test_patches_that_do_not_merge_are_read_as_without():
    images = busy_and_smooth(2, 150, 250)
    model, plain = (read_at_own_resolution(6.0, own, pixel_mean=[128] * 3) for own in (True, False))
    ours, theirs = logits_of(model, images), logits_of(plain, images)
    sides = nn.functional.interpolate(model.backbone.trunk.last_layout.side_BHW[:, None].float(), scale_factor=16.0)
    is_base = (sides == 16)[..., :150, :250].expand_as(ours)
    assert 0.1 < is_base.float().mean() < 0.9
    assert torch.equal(ours[is_base], theirs[is_base]) and not torch.isclose(ours[~is_base], theirs[~is_base]).all()
    single = torch.cat([logits_of(model, image[None]) for image in images])
    assert relative_error(ours, single) < 1e-5
    nothing_merged = read_at_own_resolution(0.0), read_at_own_resolution(0.0, False)
    assert torch.equal(*(logits_of(each, images) for each in nothing_merged))


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (64, 256), (256, 64)])
def test_an_image_too_small_for_a_pyramid_of_large_patches_is_read_on_a_finer_grid(height, width):
    model, plain = (read_at_own_resolution(float("inf"), own) for own in (True, False))
    images = torch.randn(1, 3, height, width)  # a side of one patch of 64 pixels; the coarsest map has half as many
    assert torch.equal(logits_of(model, images), logits_of(plain, images))


@torch.no_grad()
def test_the_decode_head_learns_from_what_it_says_at_patches_own_resolution():
    images = busy_and_smooth(2, 160, 256)
    model, plain = (read_at_own_resolution(6.0, own, pixel_mean=[128] * 3) for own in (True, False))
    masks = torch.randint(CLASSES, (2, 160, 256))
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=mask[None]), metainfo=dict(img_shape=(160, 256))) for mask in masks
    ]
    losses = {"own": model.loss(images, samples), "base": plain.loss(images, samples)}
    expected = nn.functional.cross_entropy(logits_of(model, images), masks)
    assert losses["own"]["decode.loss_ce"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["base"]["decode.loss_ce"].item() != pytest.approx(expected.item(), rel=1e-5)
    assert losses["own"].keys() == losses["base"].keys()
    assert torch.equal(losses["own"]["aux.loss_ce"], losses["base"]["aux.loss_ce"])


# ------------------------------------------------------------------------------------------- sliding

SLIDE = dict(mode="slide", crop_size=(64, 64), stride=(43, 43))


def busy_and_smooth(batch: int, height: int, width: int) -> torch.Tensor:
    """Noise whose strength falls from left to right, so that crops merge more or less of it."""
    fade = torch.linspace(1, 0, width) ** 4
    return torch.randn(batch, 3, height, width) * fade


@pytest.mark.parametrize("merge", ["dense", "apt", "resizing", "random"])
@pytest.mark.parametrize("height, width", [(64, 64), (96, 128), (101, 75), (40, 150), (50, 30)])
@pytest.mark.parametrize("budget", [None, 300, 1])
def test_packed_sliding_equals_mmsegs(merge, height, width, budget):
    backbone = {} if merge == "dense" else dict(thresholds={16: 4.0}, merge=merge, pixel_mean=[128] * 3)
    model = build(size=64, patch=8, test_cfg=dict(**SLIDE, token_budget=budget), **backbone)
    images = busy_and_smooth(2, height, width)
    metas = [dict(ori_shape=(height, width), img_shape=(height, width))] * 2
    with torch.no_grad():
        packed = model.slide_inference(images, metas)
        one_by_one = EncoderDecoder.slide_inference(model, images, [dict(meta) for meta in metas])
    assert packed.shape == (2, CLASSES, height, width)
    assert (packed - one_by_one).abs().max() < 1e-5 * max(1, one_by_one.abs().max())


def token_counts(model, images) -> list[int]:
    """Tokens of each batch that goes through the backbone."""
    counts = []
    handle = model.backbone.register_forward_hook(lambda backbone, *_: counts.append(len(backbone.last_layout.side_T)))
    with torch.no_grad():
        model.slide_inference(images, [dict(ori_shape=images.shape[2:])] * len(images))
    handle.remove()
    return counts


def test_the_token_budget_decides_how_many_crops_go_together():
    images = busy_and_smooth(1, 64, 300)  # seven crops of 64 cells and a CLS token each
    dense = build(size=64, patch=8, test_cfg=dict(**SLIDE, token_budget=200))
    assert token_counts(dense, images) == [195, 195, 65]
    apt = build(size=64, patch=8, thresholds={16: 4.0}, pixel_mean=[128] * 3, test_cfg=dense.test_cfg)
    merged = token_counts(apt, images)
    assert max(merged) <= 200 and len(merged) < 3, merged
    dense.test_cfg.token_budget = 7 * 64
    assert token_counts(dense, images) == [6 * 65, 65], "CLS tokens count"
    dense.test_cfg.token_budget = None
    assert token_counts(dense, images) == [7 * 65]


@pytest.mark.parametrize("budget", [None, 10, 15, 100])
def test_packing_keeps_order_and_budget(budget):
    lengths = [5, 5, 5, 12, 1, 1, 9]
    runs = seg.pack(lengths, budget)
    assert [item for run in runs for item in run] == list(range(len(lengths)))
    if budget is None or budget == 100:
        assert len(runs) == 1
    else:
        totals = [sum(lengths[item] for item in run) for run in runs]
        assert all(total <= budget or len(run) == 1 for total, run in zip(totals, runs))
        # No run could have taken the item after it.
        assert all(total + lengths[run.stop] > budget for total, run in zip(totals, runs[:-1]))


def test_logits_of_odd_sizes_stay_aligned_with_the_pixels():
    model = build(size=64, patch=8)
    image = torch.randn(1, 3, 53, 42)
    padded = torch.nn.functional.pad(image, (0, 6, 0, 3))
    with torch.no_grad():
        logits = model.encode_decode(image, [dict(img_shape=(53, 42))])
        expected = model.encode_decode(padded, [dict(img_shape=(56, 48))])[:, :, :53, :42]
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("side", [64, 53])
def test_what_a_model_says_in_a_test_is_what_its_training_would_call_right(side):
    model = build(size=64, patch=8)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        said_BHW = model.encode_decode(images, [dict(img_shape=(side, side))] * 2).argmax(1)
        samples = [SegDataSample(gt_sem_seg=PixelData(data=said_HW[None])) for said_HW in said_BHW]
        losses = model.loss(images, samples)
    assert float(losses["decode.acc_seg"]) == 100
    assert all(sample.gt_sem_seg.shape == (side, side) for sample in samples), "the caller's own stay as they are"


def test_models_pickle():
    copied = pickle.loads(pickle.dumps(build(size=64, patch=8)))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert copied.encode_decode(image, [dict(img_shape=(64, 64))]).isfinite().all()


@pytest.mark.parametrize("height, width", [(1, 1), (3, 40), (15, 16)])
def test_images_smaller_than_a_patch_are_padded(height, width):
    model = build(thresholds={32: 5.75}, test_cfg=dict(mode="slide", crop_size=(96, 96), stride=(64, 64)))
    with torch.no_grad():
        logits = model.slide_inference(torch.randn(1, 3, height, width), [dict(ori_shape=(height, width))])
    assert logits.shape == (1, CLASSES, height, width) and logits.isfinite().all()


def test_images_too_narrow_for_a_quarter_size_map_are_padded():
    """The tiny configs' coarsest map has a quarter of the grid's cells along each side."""
    narrow = config(test_cfg=dict(mode="slide", crop_size=(96, 96), stride=(64, 64)))
    narrow["neck"]["rescales"] = [2, 1, 0.5, 0.25]
    init_default_scope("mmseg")
    model = MODELS.build(narrow).eval()
    with torch.no_grad():
        logits = model.slide_inference(torch.randn(1, 3, 96, 40), [dict(ori_shape=(96, 40))])
    assert logits.shape == (1, CLASSES, 96, 40) and logits.isfinite().all()


# ------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "test_cfg, message",
    [
        (dict(mode="slide", crop_size=(12, 64), stride=(8, 8)), "smaller than a patch; use at least 16 x 16"),
        (dict(mode="slide", crop_size=(64, 64), stride=(65, 40)), "at most the crop size"),
        (dict(mode="slide", crop_size=(64, 64), stride=(0, 40)), "at least 1"),
    ],
)
def test_unusable_crops_are_refused(test_cfg, message):
    with pytest.raises(ValueError, match=message):
        build(test_cfg=test_cfg)


def test_training_crops_smaller_than_a_patch_are_refused():
    small = config()
    small["data_preprocessor"]["size"] = (8, 96)
    with pytest.raises(ValueError, match=r"data_preprocessor.size \(8, 96\) is smaller than a patch"):
        MODELS.build(small)
