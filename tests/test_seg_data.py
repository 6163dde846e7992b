"""Masks and checkpoints that do not fit are refused with a reason; border mIoU counts what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage

from apt_backbones import load_converted
from apt_backbones.mm.seg_data import TrimapIoUMetric, border_band
from tests.scripts import ROOT
from tests.test_seg_model import config


def load(tmp_path, mask: np.ndarray, image_shape=(20, 30), num_classes=3, reduce_zero_label=False) -> dict:
    """What mmseg's loading and our check make of a mask."""
    init_default_scope("mmseg")
    Image.fromarray(np.zeros((*image_shape, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    results = dict(
        img_path=str(tmp_path / "image.png"),
        seg_map_path=str(tmp_path / "mask.png"),
        reduce_zero_label=reduce_zero_label,
        seg_fields=[],
    )
    check = dict(type="CheckSegMap", num_classes=num_classes)
    for step in (dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), check):
        results = TRANSFORMS.build(step)(results)
    return results


def test_masks_of_valid_and_ignored_ids_pass(tmp_path):
    mask = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (20, 30))
    assert np.array_equal(load(tmp_path, mask)["gt_seg_map"], mask)
    reduced = load(tmp_path, np.minimum(mask, 3), reduce_zero_label=True)["gt_seg_map"]
    assert set(np.unique(reduced)) == {0, 1, 2, 255}  # 0 was "unlabelled"


def test_masks_with_other_ids_are_refused(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[3, 4], mask[5, 6] = 3, 254
    with pytest.raises(ValueError, match=r"mask.png holds label ids \[3, 254\].* there are 3 classes"):
        load(tmp_path, mask)


def test_masks_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mask.png is 20 x 31 pixels, its image .*image.png 20 x 30"):
        load(tmp_path, np.zeros((20, 31), np.uint8))


@pytest.mark.parametrize("form", [".safetensors", ".pth"])
def test_mmsegs_own_inference_takes_a_configuration_and_its_checkpoint(form, tmp_path):
    checkpoint = ROOT / "seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
    if form == ".pth":
        torch.save({"state_dict": load_file(checkpoint)}, checkpoint := tmp_path / "weights.pth")
    with pytest.warns(UserWarning):  # the weights alone do not say what the classes are
        model = init_model(str(ROOT / "seg_configs/eva02_tiny_apt_photoshapes.py"), str(checkpoint), device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert inference_model(model, image).pred_sem_seg.data.shape == (1, 50, 70)


def dataset_of(kind, root, images, masks):
    """mmseg's data set of a folder, which reads masks only."""
    init_default_scope("mmseg")
    return DATASETS.build(
        dict(
            type=kind,
            data_root=str(root),
            data_prefix=dict(img_path=images, seg_map_path=masks),
            pipeline=[dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
        )
    )


def test_photoshapes_masks_become_figure_and_ground(tmp_path):
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((4, 7, 3), np.uint8)).save(tmp_path / "images/1.jpg")
    ids = np.arange(8, dtype=np.uint8)[:7]  # 0 unlabelled, 1 background, 2 to 6 the first five shapes
    Image.fromarray(np.tile(ids, (4, 1))).save(tmp_path / "annotations/1.png")
    dataset = dataset_of("PhotoShapesDataset", tmp_path, "images", "annotations")
    mask = dataset[0]["data_samples"].gt_sem_seg.data[0]
    assert mask.tolist() == [[255, 0, 1, 1, 1, 1, 1]] * 4
    assert dataset.metainfo["classes"] == ("background", "shape")


def test_camvid_ignores_what_is_none_of_its_classes(tmp_path):
    for folder, pixels in (
        ("test", np.zeros((2, 12, 3), np.uint8)),
        ("testannot", np.tile(np.arange(12, dtype=np.uint8), (2, 1))),
    ):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "1.png")
    dataset = dataset_of("CamVidDataset", tmp_path, "test", "testannot")
    assert dataset[0]["data_samples"].gt_sem_seg.data[0].tolist() == [[*range(11), 255]] * 2
    assert len(dataset.metainfo["classes"]) == len(dataset.metainfo["palette"]) == 11


# ------------------------------------------------------------------------------------------- border mIoU


@pytest.mark.parametrize("width", [1, 3])
def test_border_band_is_what_is_near_another_class(width):
    label = np.zeros((40, 50), np.uint8)
    label[5:20, 8:30], label[15:35, 25:45], label[0:3, 45:] = 1, 2, 255
    near = np.zeros(label.shape, bool)
    for value in np.unique(label):  # chessboard distance to the nearest pixel of another class
        near |= (label == value) & (ndimage.distance_transform_cdt(label == value, metric="chessboard") <= width)
    assert 0 < near.mean() < 0.6
    assert np.array_equal(border_band(torch.from_numpy(label), width).numpy(), near)


def test_border_miou_sees_errors_at_borders_only():
    label = torch.zeros(1, 40, 40, dtype=torch.long)
    label[:, 10:30, 10:30] = 1
    inner = label.clone()
    inner[:, 18:22, 18:22] = 0  # wrong, but eight pixels from the border
    shifted = label.roll(2, dims=2)

    def figures(prediction):
        metric = TrimapIoUMetric(width=3, iou_metrics=["mIoU"], prefix="border")
        metric.dataset_meta = dict(classes=("a", "b"))
        sample = dict(pred_sem_seg=dict(data=prediction), gt_sem_seg=dict(data=label))
        metric.process({}, [sample])
        assert sample["gt_sem_seg"]["data"] is label  # other metrics see the whole mask
        return metric.evaluate(1)

    assert figures(inner)["border/mIoU"] == 100
    assert figures(label)["border/aAcc"] == 100
    band = border_band(label[0], 3)
    right = (shifted == label)[0][band].float().mean()
    assert figures(shifted)["border/aAcc"] == pytest.approx(100 * float(right), abs=0.01)


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def messages(monkeypatch):
    """What is logged while loading."""
    logged = []
    monkeypatch.setattr("apt_backbones.mm.seg.print_log", lambda message, logger: logged.append(message))
    return logged


LOADERS = {"ours": load_converted, "mmengine's": load_state_dict}


def build(size=96, classes=5, **kwargs):
    init_default_scope("mmseg")
    cfg = config(size=size)
    cfg.decode_head.num_classes = cfg.auxiliary_head.num_classes = classes
    return MODELS.build(ConfigDict(**cfg, **kwargs)).eval()


@pytest.mark.parametrize("load_into", LOADERS.values(), ids=LOADERS)
def test_positions_of_another_crop_size_are_resampled_with_a_message(load_into, messages):
    small, large = build(size=64), build(size=128)
    with torch.no_grad():
        # Positions that grow evenly from left to right still do afterwards, away from the edges.
        small.backbone.pos_embed[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]
    weights = small.state_dict()
    load_into(large, weights)
    assert messages == ["positions resampled from 4 x 4 to 8 x 8 patches"]
    assert torch.equal(large.backbone.pos_embed[:, 0], small.backbone.pos_embed[:, 0])
    row = large.backbone.pos_embed[0, 1:, 0].view(8, 8)[3]
    assert torch.allclose(row + row.flip(0), torch.full((8,), 3.0)) and (row.diff() > 0).all()
    assert torch.equal(large.backbone.blocks[0].attn.q_proj.weight, small.backbone.blocks[0].attn.q_proj.weight)
    assert weights["backbone.pos_embed"].shape[1] == 17  # the caller's weights stay as they were


@torch.no_grad()
def test_positions_of_a_larger_crop_are_resampled_as_the_trunk_does_it():
    """Without antialiasing, which matters where there are fewer than before."""
    large, small = build(size=128), build(size=64)
    load_converted(small, large.state_dict())
    cells = large.backbone.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(cells, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(small.backbone.pos_embed[:, 1:], expected)


@pytest.mark.parametrize("load_into", LOADERS.values(), ids=LOADERS)
def test_another_number_of_classes_is_refused_unless_new_classifiers_are_wanted(load_into, messages):
    weights = build(classes=7).state_dict()
    with pytest.raises(ValueError, match=r"conv_seg.weight of the checkpoint has 7 classes, the model 5; set"):
        load_into(build(), weights)
    model = build(new_classifier=True)
    classifier = model.decode_head.conv_seg.weight.detach().clone()
    load_into(model, weights)
    assert torch.equal(model.decode_head.conv_seg.weight, classifier)
    assert torch.equal(model.decode_head.bottleneck.conv.weight, weights["decode_head.bottleneck.conv.weight"])
    assert len(messages) == 4 and "decode_head.conv_seg.weight of the checkpoint has 7 classes" in messages[0]
