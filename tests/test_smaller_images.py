"""A network that learns to read smaller images, without labels: the baseline that merging is compared with."""

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from apt_backbones import adapt
from apt_backbones.distill import ViewSettings
from apt_backbones.images import read_rgb, to_tensor
from apt_backbones.mm.smaller_images import SmallerImages, finetune_for_smaller_images
from tests.scripts import data_options, interrupt, run_script

SEG = "seg_configs/eva02_tiny_{}_photoshapes.py"
WEIGHTS = "seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
SIZES = [(16, 16), (24, 24)]


@pytest.fixture
def paths(tmp_path):
    chance = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.rand(10, 10, 3, generator=chance).mul(255).byte().numpy()
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def network():
    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=0
    )
    return adapt(vit, {8: float("inf")}, merge="resizing").eval()


def outputs_of(vit):
    return lambda pixels: vit.feature_maps((pixels - 128) / 64)[0]


def tuned(paths, work_dir, **options):
    """A network, and the curve of its tuning."""
    vit, views = network(), ViewSettings((32, 32), scales=(1.0, 1.2))
    options = dict(iterations=40, rate=1e-2, workers=0, rank=4) | options
    return vit, finetune_for_smaller_images(vit, outputs_of(vit), SIZES, paths, views, work_dir, **options)["distance"]


def test_smaller_images_come_nearer_to_what_the_network_said_of_whole_ones(paths, tmp_path):
    vit, curve = tuned(paths, tmp_path / "run", iterations=100, rate=3e-2)
    assert len(curve) == 100
    original = network()
    original.thresholds = vit.thresholds = {}
    whole = torch.cat([to_tensor(read_rgb(path)) for path in paths])[..., :32, :32].float()
    expected = outputs_of(original)(whole)
    for size in SIZES:
        smaller = F.interpolate(whole, size, mode="bicubic", antialias=True)
        errors = [
            (F.interpolate(outputs_of(network)(smaller), (8, 8), mode="bilinear") - expected).square().mean()
            for network in (vit, original)
        ]
        assert errors[0] < 0.95 * errors[1]


def test_the_result_is_the_same_network_with_other_weights_in_its_blocks(paths, tmp_path):
    vit, _ = tuned(paths, tmp_path / "run")
    before = network().state_dict()
    assert vit.state_dict().keys() == before.keys()
    linear = {name for name, layer in vit.blocks.named_modules() if type(layer) is nn.Linear}
    changed = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(linear) == 8 and changed == {f"blocks.{name}.weight" for name in linear}
    assert vit.thresholds == {8: float("inf")}, "it merges as before"


def test_until_it_has_learned_it_is_the_network_itself():
    vit = network()
    matching = SmallerImages(vit, outputs_of(vit), SIZES[:1])
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    distance = matching(pixels)["distance"]
    other = network()
    other.thresholds = {}
    smaller = F.interpolate(pixels.float(), (16, 16), mode="bicubic", antialias=True)
    found = F.interpolate(outputs_of(other)(smaller), (8, 8), mode="bilinear")
    dense = outputs_of(other)(pixels.float())
    expected = ((found - dense).square().mean((0, 2, 3)) / dense.var((0, 2, 3))).mean()
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_every_layer_learns(name):
    """EVA's queries, keys and values too, which timm computes from the layer's weight."""
    model = adapt(
        timm.create_model(name, depth=2, num_classes=0, dynamic_img_size=True), merge="resizing", padding="coarsest"
    )
    patch, images = model.patch_size, torch.rand(2, 3, 64, 64) * 255
    smaller = SmallerImages(model.eval(), lambda pixels: model(pixels / 64), [(4 * patch, 4 * patch)])
    smaller(F.interpolate(images, 8 * patch))["loss"].backward()
    learned = {name: weight.grad for name, weight in smaller.lora[0].named_parameters() if "lora_B" in name}
    assert len(learned) >= 8 and all(grad is not None and grad.any() for grad in learned.values())
    smaller.merge()
    assert not getattr(model.blocks[0].attn, "qkv_bias_separate", False), "timm's own way again"


def test_an_interrupted_run_goes_on(paths, tmp_path, monkeypatch):
    whole, curve = tuned(paths, tmp_path / "whole")
    calls = interrupt(monkeypatch, SmallerImages, 31)
    with pytest.raises(KeyboardInterrupt):
        tuned(paths, tmp_path / "parts")
    calls.clear()
    resumed, again = tuned(paths, tmp_path / "parts")
    assert len(calls) == 10
    assert again == pytest.approx(curve, rel=1e-4)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_tool_writes_weights_that_equal_tokens_takes_for_smaller_images(photoshapes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "smaller.safetensors"
    model = [SEG.format("apt"), "--weights", WEIGHTS, "--images", photoshapes / "images/training", "--out", out]
    short = ["--iterations", 2, "--batch", 1, "--view", 80, "--rate", 0.01, "--device", "cpu"]
    run_script(monkeypatch, "tools/finetune_smaller.py", *model, *short, "--plot", tmp_path / "curve.png")
    assert "distance to what the model says of whole images" in capsys.readouterr().out
    assert (tmp_path / "curve.png").stat().st_size
    before, after = load_file(WEIGHTS), load_file(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.blocks.") for name in changed)
    monkeypatch.setattr("tools.mm_runs.TIMED_IMAGES", 1)
    options = ["--cfg-options", *(f"{name}={value}" for name, value in data_options(photoshapes).items())]
    compared = ["--smaller", out, "--keep", 0.5, "--scorer", "laplacian", "--work-dir", tmp_path / "run", *options]
    run_script(monkeypatch, "tools/equal_tokens.py", SEG.format("apt"), WEIGHTS, *compared)
    assert "of as many tokens" in capsys.readouterr().out


def test_other_weights_in_the_same_file_are_trained_anew(photoshapes, tmp_path, monkeypatch):
    """And no checkpoint of an earlier run takes their place."""
    weights, out = tmp_path / "weights.safetensors", tmp_path / "smaller.safetensors"
    arguments = [SEG.format("apt"), "--weights", weights, "--images", photoshapes / "images/training", "--out", out]
    arguments += ["--iterations", 2, "--batch", 1, "--view", 80, "--device", "cpu"]
    name = "backbone.blocks.0.norm1.weight"
    for scale in (1, 2):
        tensors = load_file(WEIGHTS)
        tensors[name] *= scale
        save_file(tensors, weights)
        run_script(monkeypatch, "tools/finetune_smaller.py", *arguments)
        assert torch.equal(load_file(out)[name], tensors[name])


def test_what_cannot_learn_it_is_refused(photoshapes, tmp_path, monkeypatch):
    images = ["--images", photoshapes / "images/training", "--out", tmp_path / "smaller.safetensors"]
    detector = "det_configs/eva02_tiny_apt_photoshapes.py"
    weights = "det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors"
    with pytest.raises(SystemExit, match="only what a segmenter or classifier says stays the same in a smaller image"):
        run_script(monkeypatch, "tools/finetune_smaller.py", detector, "--weights", weights, *images)
    segmenter = [SEG.format("apt"), "--weights", WEIGHTS]
    with pytest.raises(SystemExit, match="--keep takes shares between 0 and 1"):
        run_script(monkeypatch, "tools/finetune_smaller.py", *segmenter, *images, "--keep", 70)
    assert not (tmp_path / "smaller.safetensors").exists()
