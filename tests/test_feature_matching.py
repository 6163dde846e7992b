"""A fine-tune without labels: the new layers, and only they, learn what merging costs."""

import argparse
import math

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from apt_backbones import adapt
from apt_backbones.distill import ViewSettings
from apt_backbones.freeze import is_new
from apt_backbones.mm.feature_matching import FeatureMatching, RandomViews, distance_from, finetune_features
from apt_backbones.new_layers import load_new_layers, save_new_layers
from tests.scripts import interrupt, run_script
from tools.frozen_model import frozen_model, model_key


@pytest.fixture
def paths(tmp_path):
    chance = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.rand(40, 40, 3, generator=chance).mul(255).byte().numpy()
        Image.fromarray(pixels).resize((80, 80), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def network(threshold=float("inf"), merge="apt", **options):
    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=0
    )
    return adapt(vit, {8: threshold}, merge=merge, **options).eval()


def outputs_of(vit):
    return lambda pixels: torch.cat(vit.feature_maps((pixels - 128) / 64), 1)


def run(vit, paths, work_dir, iterations=40, **options):
    views = ViewSettings((32, 32))
    return finetune_features(
        vit, outputs_of(vit), paths, views, work_dir, iterations=iterations, rate=1e-2, workers=0, **options
    )


@pytest.mark.parametrize(
    "layers",
    [{}, dict(merge="resizing", adapter_rank=4), dict(merge="resizing", map_fill="learned")],
    ids=["embedding", "adapters", "maps"],
)
def test_the_distance_falls_and_only_new_layers_change(layers, paths, tmp_path):
    vit = network(**layers)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    curve = run(vit, paths, tmp_path / "run")["distance"]
    assert len(curve) == 40 and sum(curve[-5:]) < 0.95 * sum(curve[:5])
    changed = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_new(name)}
    assert not any(module.training for module in vit.modules())
    save_new_layers(vit, tmp_path / "new.safetensors")
    other = network(**layers)
    load_new_layers(other, tmp_path / "new.safetensors")
    pixels = torch.rand(1, 3, 32, 32) * 255
    assert torch.equal(outputs_of(vit)(pixels), outputs_of(other)(pixels))


def test_distances_of_maps_weigh_channels_alike_and_those_of_few_images_do_not():
    dense = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 10, 100])[:, None, None]
    expected = (4 * dense.square().mean((0, 2, 3)) / dense.var((0, 2, 3))).mean()
    torch.testing.assert_close(distance_from(dense, 3 * dense, "features"), expected)
    pooled = dense[:, :, 0, 0]
    expected = (4 * pooled.square().mean(0)).mean() / pooled.var(0).mean()
    torch.testing.assert_close(distance_from(pooled, 3 * pooled, "features"), expected)


def test_the_divergence_is_from_what_the_dense_network_says():
    dense, found = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(distance_from(dense, found, "probabilities")) == pytest.approx(expected)


def test_the_share_of_tokens_leaves_the_cls_token_out():
    vit = network()
    assert FeatureMatching(vit, outputs_of(vit))(torch.rand(2, 3, 32, 32) * 255)["kept"] == 0.25


def test_an_image_is_seen_otherwise_in_every_turn_and_alike_in_every_run(paths):
    seen = []

    def prepare(image):
        seen.append(image.tobytes())
        return image

    views, again = (RandomViews(paths, ViewSettings((32, 32)), 12, prepare) for _ in range(2))
    assert len({views[index].numpy().tobytes() for index in range(12)}) == 12
    assert all(len(set(seen[turn : turn + 4])) == 4 for turn in (0, 4, 8)) and seen[:4] != seen[4:8]
    assert all(torch.equal(views[index], again[index]) for index in range(12))


def test_an_interrupted_run_goes_on(paths, tmp_path, monkeypatch):
    whole = network()
    curve = run(whole, paths, tmp_path / "whole")
    calls = interrupt(monkeypatch, FeatureMatching, 31)
    with pytest.raises(KeyboardInterrupt):
        run(network(), paths, tmp_path / "parts")
    calls.clear()
    resumed = network()
    again = run(resumed, paths, tmp_path / "parts")
    assert len(calls) == 10
    assert again["distance"] == pytest.approx(curve["distance"], rel=1e-4)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_layers_of_maps_learn_on_finer_maps_too(paths):
    """They are on the base cells whatever the scale, so that a file goes with every scale."""
    vit = network(5.0, "resizing", map_fill="learned", map_scale=2)
    pixels = torch.randint(0, 255, (2, 3, 64, 48), dtype=torch.uint8)
    pixels[..., :32] = 0
    FeatureMatching(vit, outputs_of(vit))(pixels)["loss"].backward()
    assert vit.map_detail["1"].out.weight.grad.any()
    assert vit.feature_maps(torch.zeros(1, 3, 64, 48))[0].shape[2:] == (32, 24)


def test_pooled_features(paths, tmp_path):
    vit = network(merge="resizing", adapter_rank=4)
    views = ViewSettings((32, 32))
    options = dict(iterations=40, rate=1e-2, workers=0)
    curve = finetune_features(vit, lambda pixels: vit((pixels - 128) / 64), paths, views, tmp_path / "run", **options)
    assert sum(curve["distance"][-5:]) < 0.9 * sum(curve["distance"][:5])


def test_probabilities(paths, tmp_path):
    vit = network()
    features = outputs_of(vit)
    views = ViewSettings((32, 32))
    curve = finetune_features(
        vit,
        lambda pixels: features(pixels).softmax(1),
        paths,
        views,
        tmp_path / "run",
        loss="probabilities",
        iterations=20,
        rate=1e-2,
        workers=0,
    )["distance"]
    assert min(curve) >= 0 and sum(curve[-5:]) < sum(curve[:5])


@pytest.mark.parametrize("iterations", [2, 15, 20])
def test_short_runs_reach_the_rate_that_is_asked_for(iterations, paths, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args)
    )
    run(network(), paths, tmp_path / "run", iterations=iterations)
    assert len(rates) == iterations and max(rates) == pytest.approx(1e-2)


def test_what_cannot_be_trained_is_refused(tmp_path):
    vit = network(0.0)
    with pytest.raises(ValueError, match="nothing merges"):
        FeatureMatching(vit, outputs_of(vit))
    with pytest.raises(ValueError, match="unknown loss"):
        FeatureMatching(network(), outputs_of(vit), "labels")
    with pytest.raises(ValueError, match="no variance"):
        distance_from(torch.randn(1, 8), torch.randn(1, 8), "features")
    save_new_layers(vit, tmp_path / "new.safetensors")
    wider = adapt(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), {32: 5.0})
    with pytest.raises(ValueError, match=r"conv_down.bias is \(24,\) in .* and \(192,\) in the model"):
        load_new_layers(wider, tmp_path / "new.safetensors")


def test_the_tool_trains_the_layers_that_are_named(paths, tmp_path, monkeypatch, capsys):
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    images = [
        "--images",
        tmp_path,
        "--weights",
        tmp_path / "weights.safetensors",
        "--out",
        tmp_path / "new.safetensors",
    ]
    short = ["--keep", 0.6, "--iterations", 2, "--batch", 1, "--view", 32, "--device", "cpu"]
    run_script(
        monkeypatch,
        "tools/finetune_features.py",
        "vit_tiny_patch16_224",
        *images,
        *short,
        "--train",
        "maps",
        "embedding",
    )
    layers = {name.rsplit(".", 1)[0] for name in load_file(tmp_path / "new.safetensors")}
    assert {"conv_down", "map_detail.5.out", "map_detail.8.out", "map_detail.11.out"} <= layers
    adapters = ["vit_tiny_patch16_224", *images, *short, "--train", "adapters", "--rank", 2, "--target", "pooled"]
    with pytest.raises(SystemExit, match="give --batch 2 or more"):
        run_script(monkeypatch, "tools/finetune_features.py", *adapters)
    run_script(monkeypatch, "tools/finetune_features.py", *adapters, "--batch", 2)
    tensors = load_file(tmp_path / "new.safetensors")
    assert len(tensors) == 12 * 4 and tensors["token_adapters.11.qkv.down.weight"].shape == (2, 192)
    with pytest.raises(SystemExit, match="pooled features do not depend on how maps are filled"):
        maps = ["--train", "maps", "--target", "pooled"]
        run_script(monkeypatch, "tools/finetune_features.py", "vit_tiny_patch16_224", *images, *short, *maps)
    with pytest.raises(SystemExit, match="20 x 20 pixels, which hold no patch of 32; give larger --images"):
        run_script(monkeypatch, "tools/distill_scorer.py", "vit_tiny_patch16_224", *images, "--resize", 20)
    with pytest.raises(SystemExit, match="a configuration names its new layers itself"):
        run_script(monkeypatch, "tools/finetune_features.py", "a_config.py", *images, "--train", "maps")
    with pytest.raises(SystemExit, match="--keep takes shares between 0 and 1"):
        run_script(monkeypatch, "tools/finetune_features.py", "vit_tiny_patch16_224", *images, "--keep", 0)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "tools/finetune_features.py", "vit_tiny_patch16_224", *images, "--rate", 0)
    assert "argument --rate: must be above 0, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_networks_of_timms_that_are_no_plain_vits_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is no plain ViT"):
        frozen_model(name, "none.safetensors", None)


def test_networks_may_have_the_tag_of_their_weights(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    frozen = frozen_model("vit_tiny_patch16_224.augreg_in21k", tmp_path / "weights.safetensors", None)
    assert torch.equal(frozen.trunk.pos_embed, vit.pos_embed)


def test_other_weights_in_the_same_file_are_trained_anew(paths, tmp_path, monkeypatch):
    weights, out = tmp_path / "weights.safetensors", tmp_path / "new.safetensors"
    files = ["--images", tmp_path, "--weights", weights, "--out", out]
    short = ["--keep", 0.6, "--iterations", 2, "--batch", 1, "--view", 32, "--rate", 0.1, "--device", "cpu"]
    layers = []
    for _ in range(2):
        save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), weights)
        run_script(monkeypatch, "tools/finetune_features.py", "vit_tiny_patch16_224", *files, *short)
        layers.append(load_file(out))
    first, second = layers
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_known_by_what_its_files_hold(tmp_path):
    config, weights = tmp_path / "config.py", tmp_path / "weights.safetensors"

    def key(model, scale, value):
        config.write_text(f"model = dict(type='x', scale={scale})\n")
        save_file({"x": torch.full((1,), value)}, weights)
        return model_key(argparse.Namespace(model=str(model), weights=str(weights)))

    first = key(config, 1, 0.5)
    assert key(config, 1, 0.5) == first
    assert key(config, 2, 0.5) != first, "another configuration of the same name"
    assert key(config, 1, 0.6) != first, "other weights of the same name"
    assert key("vit_tiny_patch16_224", 1, 0.5)[0] == "vit_tiny_patch16_224"

    def key_of_named(backbone, value):
        config.write_text(f"model = dict(backbone={backbone!r})\n")
        save_file({"x": torch.full((1,), value)}, weights)
        return model_key(argparse.Namespace(model=str(config), weights=None))

    named = {"checkpoint": str(weights)}
    for backbone in (named, {"init_cfg": {"type": "Pretrained", **named}}):
        same, again, other = (key_of_named(backbone, value) for value in (0.5, 0.5, 0.6))
        assert same == again != other, "weights that the configuration names"


def test_a_run_is_known_by_the_files_of_a_llavas_folder(tmp_path):
    def key(text):
        (tmp_path / "config.json").write_text(text)
        return model_key(argparse.Namespace(model=str(tmp_path), weights=None))

    first = key("a")
    (tmp_path / "scorer.safetensors").touch()  # what a run writes there
    assert model_key(argparse.Namespace(model=str(tmp_path), weights=None)) == first and key("bb") != first
    second = key("bb")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert model_key(argparse.Namespace(model=str(tmp_path), weights=None)) != second


def test_images_of_another_size_are_trained_on_anew(paths, tmp_path, monkeypatch):
    out, layers = tmp_path / "new.safetensors", []
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    files = ["--images", tmp_path, "--weights", tmp_path / "weights.safetensors", "--out", out]
    short = ["--keep", 0.6, "--iterations", 2, "--batch", 1, "--view", 32, "--rate", 0.1, "--device", "cpu"]
    for longest in (64, 128):
        sized = ["--resize", longest]
        run_script(monkeypatch, "tools/finetune_features.py", "vit_tiny_patch16_224", *files, *short, *sized)
        layers.append(load_file(out))
    assert any(not torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
