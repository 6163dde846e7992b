"""What merging does: fewer tokens, the same for every way to compute them, and never a wrong number of placeholders."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_backbones import freeze_host
from apt_backbones.freeze import is_new
from llava_apt import LlavaAptForConditionalGeneration

from .host_reads import host_reads
from .llava_tiny import CELLS, IMAGE, PATCH, PROMPT, SIDE, difference, load_adapted, photo

load = partial(load_adapted, trained=True, thresholds={28: 2.0, 56: 1.0})


def inputs_of(processor, texts, images):
    return processor(text=texts, images=images, return_tensors="pt", padding=True)


def features_of(model, inputs):
    return model.get_image_features(inputs["pixel_values"], patch_sides=inputs["patch_sides"])


# ---------------------------------------------------------------------------------------- number of tokens


def test_flat_parts_cost_few_tokens_and_busy_parts_all(checkpoint):
    _, processor = load(checkpoint)
    flat, busy, half = (photo(flat=fraction, size=(112, 112)) for fraction in (1, 0, 0.5))
    inputs = inputs_of(processor, [PROMPT] * 3, [flat, busy, half])
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [4, 64, 2 + 32]  # 56 px, 14 px, both
    assert inputs["patch_sides"].shape == (3, 8, 8)
    assert inputs["patch_sides"][0].unique().tolist() == [56]


@pytest.mark.parametrize("merge", ["apt", "resizing", "random"])
@pytest.mark.parametrize("layout_given", [True, False])
def test_the_tower_waits_for_the_device_once(checkpoint, merge, layout_given):
    model, processor = load(checkpoint, merge=merge)
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    arguments = [inputs["pixel_values"], inputs["patch_sides"] if layout_given else None]
    with torch.no_grad():
        model.model.vision_tower(*arguments)  # fills what is kept per image size
        with host_reads() as found:
            model.model.vision_tower(*arguments)
    assert found == ["tolist"]


def test_the_tower_refuses_pixels_that_are_no_numbers(checkpoint):
    model, processor = load(checkpoint)
    pixels = inputs_of(processor, [PROMPT], [photo(0)])["pixel_values"]
    pixels[0, 1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"images \[0\] of the batch have NaN or infinite pixels$"):
        model.model.vision_tower(pixels)


@pytest.mark.parametrize("merge", ["apt", "resizing", "random"])
def test_repeated_gives_the_stock_number_of_tokens_in_raster_order(checkpoint, merge):
    model, processor = load(checkpoint, image_tokens="repeated", merge=merge)
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0, flat=1), photo(1)])
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [CELLS, CELLS]
    with torch.no_grad():
        features = features_of(model, inputs).pooler_output
        model(**inputs)
    assert [len(tokens) for tokens in features] == [CELLS, CELLS]
    if merge != "random":  # the flat image's four 56 px patches, each over 4 x 4 cells
        blocks = features[0].view(2, 4, 2, 4, -1)
        assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
        assert features[0].unique(dim=0).shape[0] == 4


def test_repeated_works_with_the_stock_processors_inputs(checkpoint):
    """Code that knows nothing of patch_sides: the tower scores the pixels itself."""
    model, processor = load(checkpoint, image_tokens="repeated")
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    with torch.no_grad():
        expected = model(**inputs).logits
        del inputs["patch_sides"]
        assert torch.equal(model(**inputs).logits, expected)


# ---------------------------------------------------------------------------------------- same result, other way


def test_batch_equals_single(checkpoint):
    model, processor = load(checkpoint)
    texts = [PROMPT, "USER: <image> a cat ? yes ASSISTANT: no USER: what ?", PROMPT]
    images = [photo(0), photo(1, flat=0.2), photo(2, flat=1)]
    batch = inputs_of(processor, texts, images)
    with torch.no_grad():
        together = model(**batch).logits
        for row, (text, image) in enumerate(zip(texts, images)):
            alone = model(**inputs_of(processor, [text], [image])).logits[0]
            assert difference(together[row, -len(alone) :], alone) <= 1e-5


@pytest.mark.parametrize("merge", ["apt", "resizing"])
def test_packed_equals_padded_and_masked(checkpoint, merge):
    """The same tokens, computed image by image in loops, padded to one length and masked, with stock CLIP layers."""
    model, processor = load(checkpoint, merge=merge)
    inputs = inputs_of(processor, [PROMPT] * 3, [photo(0), photo(1, flat=0.2), photo(2, flat=1)])
    with torch.no_grad():
        packed = features_of(model, inputs).pooler_output
        padded = padded_and_masked(model.model, inputs["pixel_values"], inputs["patch_sides"], merge)
    for tokens, reference in zip(packed, padded, strict=True):
        assert tokens.shape == reference.shape
        assert difference(tokens, reference) <= 1e-4 * float(reference.abs().max())


def padded_and_masked(llava, images: Tensor, sides: Tensor, merge: str) -> list[Tensor]:
    tower = llava.vision_tower
    weight = tower.embeddings.patch_embedding.weight
    positions = tower.embeddings.position_embedding.weight
    grid = positions[1:].T.reshape(1, -1, SIDE // PATCH, SIDE // PATCH)
    sequences = []
    for image, sides_HW in zip(images, sides):
        sequence = [tower.embeddings.class_embedding + positions[0]]
        for row in range(SIDE // PATCH):
            for column in range(SIDE // PATCH):
                side = int(sides_HW[row, column])
                cells = side // PATCH
                if row % cells or column % cells:
                    continue  # only a patch's first cell makes its token: raster order
                area = image[None, :, row * PATCH :, column * PATCH :][:, :, :side, :side]
                small = F.interpolate(area, size=(PATCH, PATCH), mode="bilinear", align_corners=False)
                token = (weight * small).sum((1, 2, 3))
                if cells > 1 and merge == "apt":
                    detail = F.conv2d(area, weight, stride=PATCH)
                    while detail.shape[-1] > 1:
                        detail = tower.adaptive_embed.conv_down(detail)
                    token = token + tower.adaptive_embed.zero_mlp(detail.flatten())
                size = SIDE // side
                coarse = grid if cells == 1 else F.interpolate(grid, size=(size, size), mode="bicubic", antialias=True)
                sequence.append(token + coarse[0, :, row // cells, column // cells])
        sequences.append(torch.stack(sequence))

    lengths = torch.tensor([len(sequence) for sequence in sequences])
    x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers[:-1]:  # LLaVA takes hidden state -2
        attention, heads = layer.self_attn, layer.self_attn.num_heads
        y = layer.layer_norm1(x)
        q, k, v = (
            proj(y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        x = x + attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return [llava.multi_modal_projector(y[1:length]) for y, length in zip(x, lengths)]


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_only_the_new_layers(checkpoint, checkpointing):
    model, processor = load(checkpoint)
    freeze_host(model).train()
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if is_new(name)}
    assert all(gradient.any() for gradient in expected.values())
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected.keys()
    if checkpointing:
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(**inputs, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            if is_new(name):
                assert difference(parameter.grad, expected[name]) <= 1e-5


def test_a_text_only_batch_trains_with_zero_gradient_and_the_same_loss(checkpoint):
    model, processor = load(checkpoint)
    freeze_host(model)
    text = processor.tokenizer(["USER: what is this ? ASSISTANT: a cat"], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**text, labels=text["input_ids"]).loss
    loss = model.train()(**text, labels=text["input_ids"]).loss
    loss.backward()
    assert difference(loss.detach(), expected) <= 1e-6
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 4 and not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------------------------------- placeholders


def test_tokens_that_swap_between_images_are_noticed(checkpoint):
    """Totals agree, images do not: transformers' own check lets this pass."""
    model, processor = load(checkpoint)
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0, flat=1), photo(0, flat=0)])
    for name in ("pixel_values", "patch_sides"):
        inputs[name] = inputs[name].flip(0)
    with pytest.raises(ValueError, match=r"images have \[64, 4\] tokens, but the text has runs of \[4, 64\]"):
        model(**inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match=r"images have \[64, 4\] tokens"):
        model(**inputs)


def test_lost_layouts_and_other_thresholds_are_noticed(checkpoint):
    model, processor = load(checkpoint)
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    with pytest.raises(ValueError, match="pass the processor's pixel_values and patch_sides together"):
        model(**{**inputs, "patch_sides": inputs["patch_sides"][:1]})
    dense, _ = load(checkpoint, thresholds={})
    with pytest.raises(ValueError, match="give the processor and the model the same thresholds"):
        dense(**inputs)
    with pytest.raises(ValueError, match="text has runs of"):
        model(**inputs_of(load(checkpoint, thresholds={})[1], [PROMPT], [photo(0)]) | {"patch_sides": None})
    with pytest.raises(ValueError, match="the vision tower takes"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][..., :56]})


def test_truncation_never_cuts_image_tokens(checkpoint):
    _, processor = load(checkpoint)
    with pytest.raises(ValueError, match="truncation"):
        processor(text=PROMPT, images=photo(flat=0), truncation=True, max_length=40, return_tensors="pt")


def test_sizes_alone_do_not_tell_the_number_of_tokens(checkpoint):
    """What vLLM asks of a processor: answerable only if every cell keeps its token."""
    with pytest.raises(ValueError, match='image_tokens="repeated"'):
        load(checkpoint)[1]._get_num_multimodal_tokens([(480, 640)])
    repeated = load(checkpoint, image_tokens="repeated")[1]
    assert repeated._get_num_multimodal_tokens([(480, 640)]).num_image_tokens == [CELLS]


# ---------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def mixed(checkpoint):
    """A batch of text only, one image and two images."""
    model, processor = load(checkpoint)
    texts = ["USER: a cat ? ASSISTANT:", PROMPT, "USER: <image> what <image> a dog ? ASSISTANT:"]
    images = [[], [photo(0)], [photo(1, flat=0.9), photo(2, flat=0.1)]]
    return model, processor, texts, images


def one_by_one(model, processor, texts, images, **settings):
    for text, pictures in zip(texts, images):
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        out = model.generate(**inputs, **settings)
        yield out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_batch_equals_one_by_one(mixed, settings):
    model, processor, texts, images = mixed
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True, **settings}
    inputs = inputs_of(processor, texts, [picture for row in images for picture in row])
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for row, alone in zip(together, one_by_one(*mixed, **settings), strict=True):
        assert torch.equal(row, alone[0])


def test_sampling_returns_several_sequences(mixed):
    model, processor, texts, images = mixed
    inputs = inputs_of(processor, texts, [picture for row in images for picture in row])
    out = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4)
    assert out.shape == (6, inputs["input_ids"].shape[1] + 4)


def test_adjacent_images(mixed):
    model, processor, *_ = mixed
    inputs = inputs_of(processor, ["USER: <image><image> what ?"], [photo(1, flat=0.9), photo(2, flat=0.1)])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


# ---------------------------------------------------------------------------------------- precision, devices, compiler


def test_bfloat16_counts_as_float32_does(checkpoint):
    """The layout comes from the processor's float32 pixels; half precision must not recount it."""
    model, processor = load(checkpoint, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    inputs = inputs_of(processor, [PROMPT] * 4, [photo(seed, flat=0.3) for seed in range(4)]).to(torch.bfloat16)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 4


def test_device_map(checkpoint, tmp_path):
    """The language model's weights are on disk, and moved in for each layer's turn; the tower stays in one piece."""
    plain, processor = load(checkpoint)
    plain.save_pretrained(tmp_path)
    inputs = inputs_of(processor, [PROMPT], [photo(0)])
    with torch.no_grad():
        expected = plain(**inputs).logits
    where = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    where["model.language_model"] = "disk"
    mapped = LlavaAptForConditionalGeneration.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "o")
    with torch.no_grad():
        assert difference(mapped(**inputs).logits, expected) <= 1e-6
    assert "AptClipVisionModel" in mapped._no_split_modules
    where |= {"model.vision_tower": "disk", "model.language_model": "cpu"}
    with pytest.raises(ValueError, match="the vision tower cannot be offloaded"):
        LlavaAptForConditionalGeneration.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "o")


def test_compiled_language_model(checkpoint):
    model, processor = load(checkpoint)
    inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    with torch.no_grad():
        expected = model(**inputs).logits
        model.model.language_model.compile(backend="aot_eager", fullgraph=True)
        assert difference(model(**inputs).logits, expected) <= 1e-5


@pytest.mark.slow
def test_the_whole_compiled_model_is_as_near_to_float32_as_the_eager_one(checkpoint):
    """In float32 that is the same to 1e-5. In half precision the compiler rounds elsewhere, and more rarely."""
    model, processor = load(checkpoint)
    pixels = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1)])
    with torch.no_grad():
        expected = model(**pixels).logits
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            torch.compiler.reset()
            model, _ = load(checkpoint, dtype=dtype)
            inputs = {**pixels, "pixel_values": pixels["pixel_values"].to(dtype)}
            eager = model(**inputs).logits
            model.compile()
            compiled = model(**inputs).logits
            if dtype == torch.float32:
                assert difference(compiled, eager) <= 1e-5
            else:
                assert difference(compiled, eager) <= 8 * torch.finfo(dtype).eps
                assert difference(compiled, expected) <= 1.5 * difference(eager, expected)


def test_random_keeps_apts_number_of_tokens(checkpoint):
    counts = {}
    for merge in ("apt", "resizing", "random"):
        model, processor = load(checkpoint, merge=merge)
        inputs = inputs_of(processor, [PROMPT] * 2, [photo(0), photo(1, flat=0.8)])
        counts[merge] = (inputs["input_ids"] == IMAGE).sum(1).tolist()
        with torch.no_grad():
            model(**inputs)
    assert counts["apt"] == counts["resizing"] == counts["random"]
    assert max(counts["apt"]) < CELLS
