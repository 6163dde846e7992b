"""The processor's layout and placeholder count: always the tower's, for every image that can come."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from apt_backbones import score_patches
from llava_apt import (
    AptClipVisionConfig,
    AptClipVisionModel,
    LlavaAptForConditionalGeneration,
    LlavaAptImageProcessor,
    LlavaAptProcessor,
)
from llava_apt.image_processing import MAX_ASPECT_RATIO

from .llava_tiny import CELLS, IMAGE, PATCH, PROMPT, SIDE, TOWER, photo, stock_processor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def processor(**options) -> LlavaAptProcessor:
    stock = stock_processor()
    images = LlavaAptImageProcessor.from_dict(stock.image_processor.to_dict() | options)
    return LlavaAptProcessor(images, stock.tokenizer, PATCH, "default", num_additional_image_tokens=1)


def tower(**options) -> AptClipVisionModel:
    return AptClipVisionModel(AptClipVisionConfig(**TOWER, **options)).eval()


# ---------------------------------------------------------------------------------------- counts


@st.composite
def images(draw):
    """Photograph-like: noise of any strength on a ramp, any size and any mode."""
    width, height = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    ramp = np.linspace(0, draw(st.floats(0, 255)), width)[None, :, None] * np.ones((height, 1, 3))
    noise = generator.normal(0, draw(st.sampled_from([0, 0.5, 3, 20, 100])), (height, width, 3))
    image = Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))
    return image.convert(draw(st.sampled_from(["RGB", "L", "P", "CMYK", "RGBA", "1", "LA"])))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    pictures=st.lists(images(), min_size=1, max_size=3),
    sizes=st.integers(1, 3),
    merge=st.sampled_from(["apt", "resizing", "random"]),
    scorer=st.sampled_from(["entropy", "laplacian", "upsample_mse"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    device=st.sampled_from(DEVICES),
    do_pad=st.booleans(),
    channels_first=st.booleans(),
)
def test_placeholders_equal_the_towers_tokens(pictures, sizes, merge, scorer, dtype, device, do_pad, channels_first):
    for picture in pictures:
        hypothesis.assume(do_pad or max(picture.size) <= MAX_ASPECT_RATIO * min(picture.size))
    limit = {"entropy": 5.0, "laplacian": 0.05, "upsample_mse": 0.002}[scorer]
    options = dict(thresholds={PATCH << i: limit for i in range(1, sizes + 1)}, merge=merge, scorer=scorer)
    if channels_first:  # as torch tensors, instead of PIL images
        pictures = [torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in pictures]
    inputs = processor(**options, do_pad=do_pad)(
        images=pictures, text=[PROMPT] * len(pictures), padding=True, return_tensors="pt"
    )
    placeholders = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    inputs = inputs.to(device).to(dtype)
    model = tower(**options).to(device, dtype)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], patch_sides=inputs["patch_sides"])
    assert list(outputs.layout.num_patches) == placeholders
    assert outputs.last_hidden_state.shape[1] == sum(placeholders) + len(pictures)


def test_layout_is_that_of_the_pixels_handed_on():
    """Thresholds apply to the uint8 pixels after resizing and cropping, not to the image that was given."""
    result = processor(thresholds={28: 4.0})(images=photo(size=(300, 200)), text=PROMPT, return_tensors="pt")
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (LlavaAptImageProcessor.image_mean, LlavaAptImageProcessor.image_std)
    )
    pixels = ((result["pixel_values"] * std + mean) * 255).round()
    merged = score_patches(pixels, (28,))[28] < 4.0
    assert torch.equal(result["patch_sides"][:, ::2, ::2] == 28, merged)
    assert 0 < merged.sum() < merged.numel()


def test_unnormalised_and_unscaled_images_get_the_same_layout():
    """Callers may switch off parts of the processing; the scores stay those of pixels in 0..255."""
    process = processor(thresholds={28: 5.0})
    image = photo(size=(SIDE, SIDE)).point(lambda value: 100 + value // 6)  # with less contrast, all would merge
    expected = process(images=image, text=PROMPT, return_tensors="pt")["patch_sides"]
    assert set(expected.flatten().tolist()) == {14, 28}
    twice = {"rescale_factor": 2 / 255, "image_mean": 1.0, "image_std": [0.5] * 3}
    for options in (
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        twice,
    ):
        result = process(images=image, text=PROMPT, return_tensors="pt", **options)
        assert torch.equal(result["patch_sides"], expected)
    unit = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    result = process(images=unit, text=PROMPT, return_tensors="pt", do_rescale=False)
    assert torch.equal(result["patch_sides"], expected)


def test_square_padding_merges_by_itself():
    """LLaVA pads with one colour: entropy 0. Token savings have to be reported with and without that."""
    inputs = processor(do_pad=True, thresholds={28: 3.0})(
        images=photo(flat=0, size=(224, 112)), text=PROMPT, return_tensors="pt"
    )
    rows = inputs["patch_sides"][0, :, 0].tolist()
    assert rows == [28, 28, 14, 14, 14, 14, 28, 28]


# ---------------------------------------------------------------------------------------- images of all kinds


def count(image, **options) -> int:
    inputs = processor(**options)(images=image, text=PROMPT, return_tensors="pt")
    assert inputs["pixel_values"].isfinite().all()
    return int((inputs["input_ids"] == IMAGE).sum())


def rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored with its right side up
    photo(size=(SIDE, SIDE)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    return Image.open(tmp_path / "rotated.png")


def sixteen_bits(tmp_path):
    Image.fromarray(GREY * 256 + 17).save(tmp_path / "sixteen.png")
    return str(tmp_path / "sixteen.png")


GREY = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint16)
RED = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))


@pytest.mark.parametrize(
    "stored, shown",
    [
        (rotated, photo(size=(SIDE, SIDE))),
        (Image.fromarray(GREY * 256 + 17), Image.fromarray(GREY.astype(np.uint8))),  # scaled, not clipped
        (sixteen_bits, Image.fromarray(GREY.astype(np.uint8))),
        (np.repeat(GREY[..., None] * 256 + 17, 3, 2), Image.fromarray(GREY.astype(np.uint8))),
        (torch.from_numpy(np.stack(3 * [GREY])), Image.fromarray(GREY.astype(np.uint8))),  # 8 bits in wider numbers
        (Image.fromarray(GREY.astype(np.int32)), Image.fromarray(GREY.astype(np.uint8))),  # 8 bits in wider numbers
        (RED.convert("P"), RED),
        (RED.convert("CMYK"), RED),
    ],
    ids=[
        "EXIF",
        "16 bits",
        "16 bits, a path",
        "16 bits, numpy",
        "8 of 16 bits, torch",
        "8 of 32 bits",
        "palette",
        "CMYK",
    ],
)
def test_images_look_as_they_are_meant_to(stored, shown, tmp_path):
    stored = stored(tmp_path) if callable(stored) else stored
    results = [processor()(images=image, text=PROMPT, return_tensors="pt") for image in (stored, shown)]
    torch.testing.assert_close(results[0]["pixel_values"], results[1]["pixel_values"], rtol=0, atol=0.05)


@pytest.mark.parametrize("image_tokens", ["merged", "repeated"])
def test_arrays_of_numpy_are_those_of_torch(image_tokens):
    process = processor()
    process.image_tokens = image_tokens
    arrays, tensors = (
        process(images=photo(size=(SIDE, SIDE)), text=PROMPT, return_tensors=kind) for kind in ("np", "pt")
    )
    assert set(arrays) == set(tensors)
    assert all(np.array_equal(array, tensors[name].numpy()) for name, array in arrays.items())


def test_one_pixel_is_one_colour():
    assert count(Image.new("RGB", (1, 1), (9, 99, 199))) == CELLS // 4
    assert count(Image.new("RGB", (1, 1), (9, 99, 199)), thresholds={28: 1.0, 56: 1.0}) == CELLS // 16


def test_very_large_images():
    assert count(Image.new("RGB", (10_000, 10_000))) == CELLS // 4
    assert count(Image.new("RGB", (10_000, 10)), do_pad=True) <= CELLS


def test_images_too_narrow_to_crop_are_refused():
    """Resizing the short edge first would make this image 1,120,000 pixels long."""
    with pytest.raises(ValueError, match="10000 x 1 pixels is too narrow to crop; pass do_pad=True"):
        count(Image.new("RGB", (10_000, 1)))


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="convert the image to 8 bits first"):
        count(Image.new("F", (SIDE, SIDE)))


def test_nan_pixels_are_refused():
    pixels = torch.rand(3, SIDE, SIDE)
    pixels[0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"images \[0\] of the batch have NaN"):
        processor()(images=pixels, text=PROMPT, return_tensors="pt", do_rescale=False)


def test_images_and_placeholders_must_match():
    for text, pictures in ((PROMPT, [photo(), photo()]), ("USER: what ?", [photo()]), (PROMPT + "<image>", [photo()])):
        with pytest.raises(ValueError, match=r"number of <image> tokens"):
            processor()(images=pictures, text=text, return_tensors="pt")


def test_wrong_options():
    with pytest.raises(ValueError, match="unknown merge"):
        count(photo(), merge="drop")
    stock = stock_processor()
    with pytest.raises(ValueError, match="choose merged or repeated"):
        LlavaAptProcessor(stock.image_processor, stock.tokenizer, PATCH, "default", image_tokens="fewer")


def test_misspelt_options_are_refused(checkpoint):
    loaded = LlavaAptProcessor.from_pretrained(checkpoint, padding_side="left", revision="main", merge="resizing")
    assert loaded.tokenizer.padding_side == "left" and loaded.image_processor.merge == "resizing"
    message = r"unknown option '{}'; did you mean '{}'\? The options are thresholds, scorer, merge, adapter_rank"
    for name, meant in (("treshold", "thresholds"), ("merged", "merge"), ("dopad", "do_pad"), ("scores", "scorer")):
        for cls in (LlavaAptProcessor, LlavaAptForConditionalGeneration):
            with pytest.raises(ValueError, match=message.format(name, meant)):
                cls.from_pretrained(checkpoint, **{name: 1})
        with pytest.raises(ValueError, match=message.format(name, meant)):
            loaded(text="what", **{name: 1})
