"""LLaVA with adaptive patches beside transformers' own LLaVA: the same weights, the same inputs, the same results."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from apt_backbones.freeze import is_new
from llava_apt import (
    AptClipVisionModel,
    LlavaAptConfig,
    LlavaAptForConditionalGeneration,
    LlavaAptProcessor,
    load_new_layers,
    save_new_layers,
)

from .llava_tiny import PROMPT, SIDE, TOWER, difference, photo, stock_model, stock_processor
from .llava_tiny import load_adapted as load

ON = {"thresholds": {28: 2.0, 56: 1.0}}


@pytest.fixture(scope="module")
def stock(checkpoint):
    return stock_model(), stock_processor()


# ---------------------------------------------------------------------------------------- thresholds off


def test_stock_checkpoint_lacks_exactly_the_new_layers(checkpoint, stock):
    model, info = LlavaAptForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == {name for name, _ in model.named_parameters() if is_new(name)}
    assert len(info["missing_keys"]) == 4 and not info["unexpected_keys"]
    loaded = model.state_dict()
    for name, tensor in stock[0].state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    new = model.model.vision_tower.adaptive_embed
    assert not new.zero_mlp.weight.any() and not new.zero_mlp.bias.any() and new.conv_down.weight.std() > 0


@pytest.mark.parametrize("thresholds", [{}, {28: 0.0}, {28: 0.0, 56: 0.0}])
@pytest.mark.parametrize("batch", ["single", "left-padded"])
def test_thresholds_off_equals_stock(checkpoint, stock, thresholds, batch):
    stock_llava, processor = stock
    texts = [PROMPT] if batch == "single" else [PROMPT, "USER: <image> a cat ? yes ASSISTANT: no USER: what ?"]
    images = [photo(seed) for seed in range(len(texts))]
    expected_inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    model, adaptive_processor = load(checkpoint, thresholds=thresholds)
    inputs = adaptive_processor(images=images, text=texts, return_tensors="pt", padding=True)
    for name, tensor in expected_inputs.items():
        assert torch.equal(inputs[name], tensor), name
    with torch.no_grad():
        expected, result = stock_llava(**expected_inputs).logits, model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    assert difference(result[attended], expected[attended]) <= 1e-6
    settings = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, **settings), stock_llava.generate(**expected_inputs, **settings))


@pytest.mark.parametrize("chunk", [7, 64])
def test_a_prompt_may_be_read_in_chunks(checkpoint, chunk):
    model, processor = load(checkpoint, **ON)
    text = "USER: <image> what <image> a dog ? ASSISTANT:"
    inputs = processor(images=[photo(1), photo(2)], text=[text], return_tensors="pt")
    settings = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, **settings, prefill_chunk_size=chunk), model.generate(**inputs, **settings)
    )


def test_a_tower_that_was_dense_in_a_test_trains(checkpoint):
    model, processor = load(checkpoint, thresholds={28: 2.0}, adapter_rank=2)
    model.config.vision_config.thresholds = {}
    inputs = processor(images=[photo(1)], text=[PROMPT], return_tensors="pt")
    inputs.pop("patch_sides", None)
    with torch.inference_mode():
        dense = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    trained = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    trained.sum().backward()
    assert torch.equal(trained, dense)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [-2, -1]])
def test_feature_layers_and_strategies_equal_stock(strategy, layer):
    torch.manual_seed(0)
    config = stock_model().config
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    stock = type(stock_model())(config).eval()
    values = config.to_dict() | {"model_type": "llava_apt"}
    values["vision_config"]["thresholds"] = {"28": 0}
    model = LlavaAptForConditionalGeneration(LlavaAptConfig(**values)).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = stock.get_image_features(pixels).pooler_output
        result = model.get_image_features(pixels).pooler_output
    for image, reference in zip(result, expected, strict=True):
        assert difference(image, reference) <= 1e-6


def test_language_models_attention_stays_as_asked(checkpoint):
    model, _ = load(checkpoint, attn_implementation="eager", **ON)
    assert model.config.text_config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config.text_config._attn_implementation == "sdpa"
    tower = model.model.vision_tower
    assert tower.config._attn_implementation == tower.encoder.layers[0].self_attn.config._attn_implementation
    assert tower.config._attn_implementation == "apt_packed"


# ---------------------------------------------------------------------------------------- checkpoints


def test_auto_classes_find_a_saved_adapted_model(checkpoint, tmp_path):
    model, processor = load(checkpoint, trained=True, **ON)
    processor.image_processor.do_pad = True
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["thresholds"] == {"28": 2.0, "56": 1.0}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaAptForConditionalGeneration and type(loaded_processor) is LlavaAptProcessor
    assert loaded.config.vision_config.thresholds == {28: 2.0, 56: 1.0}
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    inputs = processor(images=photo(), text=PROMPT, return_tensors="pt")
    again = loaded_processor(images=photo(), text=PROMPT, return_tensors="pt")
    assert all(torch.equal(again[name], tensor) for name, tensor in inputs.items())
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**inputs).logits)


def test_options_of_the_tower_take_the_place_of_saved_ones_in_auto_classes_too(checkpoint, tmp_path):
    load(checkpoint, **ON)[0].save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, thresholds={28: 3.0}, merge="resizing").vision_config
    assert config.thresholds == {28: 3.0} and config.merge == "resizing"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, thresholds={28: 3.0}, merge="resizing")
    assert model.config.vision_config.to_dict() == config.to_dict()


def test_weights_may_be_handed_over_with_a_configuration(checkpoint):
    model, processor = load(checkpoint, trained=True, **ON)
    again = LlavaAptForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    inputs = processor(images=photo(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_new_layers_alone_turn_a_stock_checkpoint_into_the_adapted_model(checkpoint, tmp_path):
    adapted, processor = load(checkpoint, trained=True, **ON)
    path = save_new_layers(adapted, tmp_path)
    assert path.stat().st_size < 4 * 1.1 * (5 * 32 * 32 + 2 * 32) + 1024
    fresh, _ = load(checkpoint, **ON)
    inputs = processor(images=photo(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        expected = adapted(**inputs).logits
        assert difference(fresh(**inputs).logits, expected) > 1e-4
        assert torch.equal(load_new_layers(fresh, tmp_path)(**inputs).logits, expected)


def test_new_layers_of_other_thresholds_or_models_are_refused(checkpoint, tmp_path):
    path = save_new_layers(load(checkpoint, **ON)[0], tmp_path)
    with pytest.raises(ValueError, match="trained with thresholds"):
        load_new_layers(load(checkpoint, thresholds={28: 2.0})[0], path)
    with pytest.raises(ValueError, match="holds"):
        load_new_layers(load(checkpoint, merge="resizing")[0], path)
    with pytest.raises(ValueError, match="no new layers"):
        save_new_layers(load(checkpoint, thresholds={})[0], tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_new_layers(load(checkpoint, **ON)[0], tmp_path / "nothing")


def test_what_was_fine_tuned_gets_adapters(checkpoint, tmp_path):
    """They are zero, so that it says what it said before."""
    model, processor = load(checkpoint, **ON)
    torch.nn.init.normal_(model.model.vision_tower.adaptive_embed.zero_mlp.weight)
    model.save_pretrained(tmp_path)
    adapted = LlavaAptForConditionalGeneration.from_pretrained(tmp_path, adapter_rank=2).eval()
    inputs = processor(images=photo(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, model(**inputs).logits)
    assert adapted.model.vision_tower.token_adapters[0].qkv.down.weight.any()


@pytest.mark.parametrize("layer, left_out", [(-1, 0), (-2, 1), ([-2, -1], 0), ([1, -2], 1)])
def test_layers_up_to_the_last_that_is_read_have_adapters(layer, left_out):
    values = stock_model().config.to_dict() | {"model_type": "llava_apt", "vision_feature_layer": layer}
    values["vision_config"] |= {"thresholds": {"28": 2.0}, "adapter_rank": 2}
    tower = LlavaAptForConditionalGeneration(LlavaAptConfig(**values)).model.vision_tower
    assert len(tower.token_adapters) == tower.config.num_hidden_layers - left_out


@pytest.mark.parametrize("lost", ["layers.0.mlp.fc1.weight", "zero_mlp.weight", "adapters.0.mlp.up"])
def test_incomplete_checkpoints_are_refused(checkpoint, tmp_path, lost):
    """That lack some of LLaVA's tensors, or some of the embedding's new layers, or some of the adapters'."""
    model = load(checkpoint, adapter_rank=2, **ON)[0]
    weights = {name: tensor for name, tensor in model.state_dict().items() if lost not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=rf"lacks 1 tensors.*{lost}"):
        LlavaAptForConditionalGeneration.from_pretrained(tmp_path)


def test_other_models_are_refused(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"'llama' checkpoint, not LLaVA-1.5"):
        LlavaAptForConditionalGeneration.from_pretrained(tmp_path / "llama")
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_tower": "openai/clip"}))
    with pytest.raises(ValueError, match="original LLaVA layout"):
        LlavaAptForConditionalGeneration.from_pretrained(original)
    with pytest.raises(ValueError, match="siglip_vision_model"):
        LlavaAptConfig(vision_config={"model_type": "siglip_vision_model"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"thresholds": {32: 1.0}}, "sizes must be"),
        ({"thresholds": {28: float("nan")}}, "must be numbers"),
        ({"merge": "drop"}, "unknown merge"),
        ({"scorer": "edges"}, "unknown scorer"),
        ({"attention_dropout": 0.1}, "no dropout"),
    ],
)
def test_wrong_tower_options(options, message):
    with pytest.raises(ValueError, match=message):
        AptClipVisionModel(AptClipVisionModel.config_class(**TOWER, **options))


# ---------------------------------------------------------------------------------------- the package


def test_old_transformers_are_refused():
    code = "import transformers; transformers.__version__ = '5.19.0'; import llava_apt"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: llava_apt needs transformers >= 5.20, found 5.19.0; pip install" in result.stderr
