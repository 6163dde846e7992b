"""Detection: the converted tiny detector equals the original, and what configs, pyramid and heads promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import apt_backbones.mm.det  # noqa: F401
from apt_backbones import convert_eva02, find_trunk, load_converted, read_checkpoint
from tests.golden import load_golden, relative_error
from tests.scorers import give_scorer

CONFIGS = sorted(Path("det_configs").glob("*.py"))


def golden_detector(**backbone) -> tuple[torch.nn.Module, object]:
    """The detector of the golden file, from the same base configuration as the large ones."""
    golden = load_golden("eva02_cascade_tiny")
    config, channels = golden.config, golden.config["head_channels"]
    model = Config.fromfile("det_configs/_base_/cascade_vitdet.py").model
    names = ("img_size", "embed_dim", "depth", "num_heads", "window_size", "global_blocks", "pretrain_img_size")
    model.backbone.update({name: config[name] for name in names}, **backbone)
    model.data_preprocessor.pad_size_divisor = config["img_size"]
    model.neck.update(in_channels=config["embed_dim"], out_channels=channels)
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        extractor.out_channels = channels
    sizes = dict(in_channels=channels, conv_out_channels=channels, num_classes=config["num_classes"])
    for head in model.roi_head.bbox_head:
        head.update(sizes, fc_out_channels=config["fc_channels"])
    model.roi_head.mask_head.update(sizes)
    init_default_scope("mmdet")
    detector = MODELS.build(model).eval()
    load_converted(detector, convert_eva02(golden.weights, "det"))
    return detector, golden


@torch.no_grad()
def detect(detector, image_HWC):
    """mmdet's own inference on one RGB image."""
    shape = tuple(image_HWC.shape[:2])
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    bgr = image_HWC.permute(2, 0, 1).flip(0)
    found = detector.test_step({"inputs": [bgr], "data_samples": [sample]})[0].pred_instances
    return found[found.scores.argsort(descending=True, stable=True)]


def masks_of(golden):
    width = golden.arrays["image"].shape[1]
    bits = np.unpackbits(golden.arrays["masks"].numpy(), axis=2)[..., :width]
    return torch.from_numpy(bits).bool()


def test_the_converted_detector_finds_what_the_original_finds():
    detector, golden = golden_detector()
    found = detect(detector, golden.arrays["image"])

    assert len(found) == 100
    assert found.labels.equal(golden.arrays["classes"])
    assert (found.scores - golden.arrays["scores"]).abs().max() <= 1e-4
    assert (found.bboxes - golden.arrays["boxes"]).abs().max() <= 0.05
    masks = masks_of(golden)
    intersection, union = (found.masks & masks).sum((1, 2)), (found.masks | masks).sum((1, 2))
    assert (intersection >= 0.99 * union).all()


def test_pyramid_equals_the_original():
    golden = load_golden("eva02_det_tiny")
    pyramid = MODELS.build(dict(type="SimpleFeaturePyramid", in_channels=48, out_channels=32))
    weights = convert_eva02({k: v for k, v in golden.weights.items() if "simfp" in k}, "det")
    pyramid.load_state_dict({name.removeprefix("neck."): tensor for name, tensor in weights.items()})
    with torch.no_grad():
        levels = pyramid((golden.arrays["last_feat"],))
    for number, level in enumerate(levels, start=2):
        assert relative_error(level, golden.arrays[f"pyramid/p{number}"]) < 1e-4
        assert level.is_contiguous(), "mmcv's RoIAlign misreads other memory formats"


def test_a_map_of_one_row_has_all_levels():
    """As a very long image has."""
    pyramid = MODELS.build(dict(type="SimpleFeaturePyramid", in_channels=16, out_channels=8))
    row, column = (pyramid((torch.randn(1, 16, *size),)) for size in ((1, 6), (5, 1)))
    assert [level.shape[2:] for level in row] == [(4, 24), (2, 12), (1, 6), (1, 3), (1, 2)]
    assert [level.shape[2:] for level in column] == [(20, 4), (10, 2), (5, 1), (2, 1), (1, 1)]


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_masks_can_be_ranked_by_maskness(class_agnostic):
    # Three masks for class 1: probabilities above one half are 0.8 everywhere, 0.6 on one of four pixels, and nowhere.
    options = dict(maskness=True, num_classes=2, class_agnostic=class_agnostic)
    head = MODELS.build(dict(type="MasknessMaskHead", **options))
    logit = torch.tensor([0.8, 0.6, 0.3]).logit()
    logits = torch.full((3, 2, 2, 2), float(logit[2]))
    logits[0, 1], logits[1, 1, 0, 0] = logit[0], logit[1]
    logits = logits[:, 1:] if class_agnostic else logits
    results = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 8, 8]] * 3),
        scores=torch.tensor([0.5, 1.0, 0.9]),
        labels=torch.tensor([1, 1, 1]),
    )
    meta = dict(ori_shape=(8, 8), scale_factor=(1.0, 1.0))
    test_cfg = Config(dict(mask_thr_binary=0.5))
    (results,) = head.predict_by_feat([logits], [results], [meta], test_cfg)
    torch.testing.assert_close(results.mask_scores, torch.tensor([0.5 * 0.8, 1.0 * 0.6, 0]))
    torch.testing.assert_close(results.scores, torch.tensor([0.5, 1.0, 0.9]), msg="boxes keep their scores")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_builds_and_says_what_its_name_says(path, tmp_path):
    cfg = Config.fromfile(path)
    give_scorer(cfg, tmp_path)
    init_default_scope(cfg.default_scope)
    with torch.device("meta" if "tiny" not in path.stem else "cpu"):
        model = MODELS.build(cfg.model)
    backbone = find_trunk(model)
    method = path.stem.removeprefix("vitdet_").split("_")[2]
    assert cfg.custom_imports.imports and cfg.runner_type == "APTRunner"
    assert cfg.custom_hooks == [dict(type="TokenCountHook")]
    assert bool(backbone.thresholds) == (method != "dense")
    assert method in ("dense", backbone.merge) or (
        method in ("learned", "heads") and backbone.map_fill == "interpolate"
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert bool(cfg.load_from) == (method in ("apt", "heads"))
    if method == "apt":
        assert all("adaptive_embed" in name for name in trained)
    elif "frozen" in cfg.model.backbone:
        assert trained == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    else:
        frozen = {name for name, _ in model.named_parameters()} - trained
        unused = ("norm", "cls_token", "reg_token") if cfg.model.backbone.type == "APTTimm" else ()
        assert all(name.split(".")[2] in unused for name in frozen), "all that the maps depend on trains"
    square = cfg.model.backbone.img_size
    assert square % backbone.patch_size == 0
    whole = dict.fromkeys(("bccd", "nuclei", "persons"), backbone.patch_size) | {"rect": 2 * backbone.patch_size}
    padded = whole.get(path.stem.split("_")[-1], square)
    assert cfg.model.data_preprocessor.pad_size_divisor == padded


@pytest.mark.parametrize("size", ["b", "l", "tiny"])
def test_the_short_finetune_is_5_percent_of_the_training_at_a_tenth_of_its_rate(size):
    name = f"det_configs/eva02_{size}_{{}}_{'photoshapes' if size == 'tiny' else '1536'}.py"
    dense, apt = (Config.fromfile(name.format(method)) for method in ("dense", "apt"))
    assert apt.train_cfg.max_iters == 0.05 * dense.train_cfg.max_iters
    assert apt.optim_wrapper.optimizer.lr == pytest.approx(0.1 * dense.optim_wrapper.optimizer.lr)
    assert apt.optim_wrapper.optimizer.weight_decay == dense.optim_wrapper.optimizer.weight_decay
    assert apt.optim_wrapper.paramwise_cfg == dense.optim_wrapper.paramwise_cfg
    assert apt.train_dataloader == dense.train_dataloader


def test_the_large_configs_are_the_published_networks():
    blocks = {"b": (12, 768, 12, [1, 3, 5, 7, 9, 11], 0.7), "l": (24, 1024, 16, [2, 5, 8, 11, 14, 17, 20, 23], 0.8)}
    for size, (depth, width, heads, global_blocks, decay) in blocks.items():
        cfg = Config.fromfile(f"det_configs/eva02_{size}_dense_1536.py")
        backbone = cfg.model.backbone
        assert (backbone.depth, backbone.embed_dim, backbone.num_heads) == (depth, width, heads)
        assert list(backbone.global_blocks) == global_blocks
        assert (backbone.window_size, backbone.patch_size, backbone.img_size) == (32, 16, 1536)
        assert cfg.optim_wrapper.paramwise_cfg == dict(decay_rate=decay, decay_all=True)
        assert cfg.param_scheduler[1].milestones == [48000, 54000]


def test_the_shipped_detector_fits_its_config_and_merges_content():
    cfg = Config.fromfile("det_configs/eva02_tiny_apt_photoshapes.py")
    init_default_scope("mmdet")
    detector = MODELS.build(cfg.model).eval()
    weights = read_checkpoint("det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors")
    load_converted(detector, weights)
    assert weights["backbone.adaptive_embed.zero_mlp.weight"].any(), "the short fine-tune has left no trace"
    detect(detector, torch.full((128, 192, 3), 90, dtype=torch.uint8))
    assert detector.backbone.last_layout.num_tokens < 24 * 24 / 2


@pytest.mark.parametrize("stem", ["dinov2_s_apt_1024", "dinov3_b_apt_1024"])
def test_a_timm_detector_detects_and_learns(stem):
    """Also with patches of 14 pixels, whose pyramid has fractional strides; one window and one global block."""
    cfg = Config.fromfile(f"det_configs/{stem}.py")
    init_default_scope("mmdet")
    patch = 14 if "dinov2" in stem else 16
    cfg.model.data_preprocessor.pad_size_divisor = 16 * patch
    cfg.model.backbone.update(img_size=16 * patch, window_size=8, out_indices=(2,), checkpoint=None, test_dtype=None)
    cfg.model.test_cfg.rpn.max_per_img = cfg.model.train_cfg.rpn_proposal.max_per_img = 20
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model)
    image = torch.full((190, 224, 3), 90, dtype=torch.uint8)
    image[:100, :100] = torch.randint(0, 256, (100, 100, 3))
    detect(detector.eval(), image)
    strides = cfg.model.rpn_head.anchor_generator.strides
    assert strides[2] == patch and find_trunk(detector).last_layout.grid == (16, 16)
    sample = DetDataSample(metainfo=dict(img_shape=(190, 224), batch_input_shape=(16 * patch, 16 * patch)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[10.0, 10, 90, 90]]), labels=torch.tensor([3]))
    sample.gt_instances.masks = BitmapMasks(np.ones((1, 190, 224), np.uint8), 190, 224)
    batch = detector.data_preprocessor({"inputs": [image.permute(2, 0, 1)], "data_samples": [sample]}, training=True)
    losses, _ = detector.train().parse_losses(detector(**batch, mode="loss"))
    losses.backward()
    assert all(p.grad is not None for name, p in detector.named_parameters() if "adaptive_embed" in name)


def test_adaptive_patches_that_merge_nothing_change_nothing():
    detector, golden = golden_detector(thresholds={32: 0.0, 64: 0.0})
    found = detect(detector, golden.arrays["image"])
    assert (found.scores - golden.arrays["scores"]).abs().max() <= 1e-4
