"""LLaVA's vision tower as a timm ViT: the same network, so that the label-free tools work on it."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from apt_backbones import adapt, freeze_host
from apt_backbones.learned import load_scorer
from apt_backbones.new_layers import save_new_layers
from llava_apt import LlavaAptForConditionalGeneration, load_new_layers, options_of
from llava_apt.timm_tower import timm_tower
from tests.llava_tiny import CELLS, PATCH, SIDE, photo
from tests.scripts import run_script


@pytest.fixture
def images(tmp_path):
    for number in range(10):
        (tmp_path / "images").mkdir(exist_ok=True)
        photo(number, flat=number / 10).resize((160, 120), Image.Resampling.BICUBIC).save(
            tmp_path / f"images/{number}.png"
        )
    return tmp_path / "images"


@torch.no_grad()
@pytest.mark.parametrize("adapter_rank", [0, 3])
@pytest.mark.parametrize("thresholds", [{}, {2 * PATCH: 2.0}])
def test_it_says_what_the_language_model_gets(checkpoint, thresholds, adapter_rank, tmp_path):
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    pixels[..., : SIDE // 2] = 0
    options = dict(thresholds=thresholds, merge="resizing", adapter_rank=adapter_rank)
    llava = LlavaAptForConditionalGeneration.from_pretrained(checkpoint, **options).eval()
    of_timm = adapt(timm_tower(checkpoint), **options)
    if adapters := of_timm.token_adapters if adapter_rank and thresholds else None:
        assert not any(adapter.mlp.up.weight.any() for adapter in llava.model.vision_tower.token_adapters)
        for parameter in adapters.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        save_new_layers(of_timm, tmp_path / "adapters.safetensors")
        assert options_of(tmp_path / "adapters.safetensors") == {"merge": "resizing", "adapter_rank": 3}
        load_new_layers(llava, tmp_path / "adapters.safetensors")
    tower = llava.model.vision_tower(pixels, output_hidden_states=True)
    expected = tower.layout.to_sequence(tower.hidden_states[llava.config.vision_feature_layer][0])
    ours = of_timm.forward_features(pixels)
    assert ours.shape == (2, 1 + CELLS, 32)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_every_adapter_trains(checkpoint):
    """Layers whose output the language model does not get have none: distributed training would wait for them."""
    options = dict(thresholds={2 * PATCH: 2.0}, adapter_rank=2)
    llava = freeze_host(LlavaAptForConditionalGeneration.from_pretrained(checkpoint, **options))
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    llava.model.get_image_features(pixels).pooler_output[0].square().sum().backward()
    trained = {name: parameter for name, parameter in llava.named_parameters() if parameter.requires_grad}
    assert sum("token_adapters" in name for name in trained) == 4 * (llava.config.vision_config.num_hidden_layers - 1)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert llava.model.vision_tower.token_adapters[-1].qkv.up.weight.grad.any()


def test_a_scorer_and_new_layers_come_without_labels(checkpoint, images, tmp_path, monkeypatch):
    common = [checkpoint, "--images", images, "--device", "cpu"]
    scorer = tmp_path / "scorer.safetensors"
    short = ["--epochs", 1, "--copies", 1, "--prototypes", 4, "--out", scorer]
    run_script(monkeypatch, "tools/distill_scorer.py", *common, *short)
    assert load_scorer(scorer).sizes == (2 * PATCH,)
    layers = tmp_path / "layers.safetensors"
    short = ["--keep", 0.6, "--scorer", scorer, "--iterations", 3, "--batch", 1, "--rate", 0.1, "--out", layers]
    run_script(monkeypatch, "tools/finetune_features.py", *common, *short)
    trained = load_file(layers)
    llava = LlavaAptForConditionalGeneration.from_pretrained(
        checkpoint, thresholds={2 * PATCH: 0.1}, scorer=str(scorer)
    )
    load_new_layers(llava, layers)
    weight = llava.model.vision_tower.adaptive_embed.zero_mlp.weight
    assert weight.any() and torch.equal(weight, trained["zero_mlp.weight"])


def test_other_folders_are_refused(checkpoint, tmp_path, monkeypatch):
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist; give the folder of a LLaVA"):
        timm_tower(tmp_path)
    with pytest.raises(SystemExit, match="leave out --weights"):
        run_script(
            monkeypatch,
            "tools/distill_scorer.py",
            checkpoint,
            "--images",
            ".",
            "--weights",
            "x",
            "--out",
            "a.safetensors",
        )
