"""LLaVA's data: what is asked, what the loss counts, which samples meet in a batch, and what is refused."""

import io
import json
import re
import resource
import string
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tokenizers import Tokenizer, models, normalizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from llava_apt import LlavaAptProcessor
from llava_apt.data import (
    IGNORED,
    BadRecord,
    Conversation,
    LlavaCollator,
    LlavaDataset,
    ModalityGroupedSampler,
    parse_record,
    read_records,
    subset,
)
from llava_apt.prompt import prompt_pieces, question_prompt

from .llava_tiny import CELLS, IMAGE, photo


@pytest.fixture(scope="module")
def processor(checkpoint):
    return LlavaAptProcessor.from_pretrained(checkpoint, thresholds={28: 2.0}, do_pad=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        photo(index).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    outside = tmp_path_factory.mktemp("outside")
    photo(7).save(outside / "0.png")
    (folder / "to_a_file.png").symlink_to(outside / "0.png")
    (folder / "to_a_folder").symlink_to(outside)
    (folder / "to_another.png").symlink_to(folder / "0.png")
    return folder


def record(question="what is this ?\n<image>", answer="a cat", image="0.png", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", **({"image": image} if image else {}), "conversations": turns, **more}


# ---------------------------------------------------------------------------------------- prompt and labels


def test_prompt_is_llavas():
    pieces = prompt_pieces([("<image>\nwhat ?", "a cat"), ("who ?", None)], eos="</s>")
    assert "".join(text for text, _ in pieces) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: <image>\nwhat ? ASSISTANT: a cat</s>USER: who ? ASSISTANT:"
    )
    assert [text for text, is_answer in pieces if is_answer] == [" a cat</s>"]
    assert question_prompt("what ?", 2).endswith("USER: <image>\n<image>\nwhat ? ASSISTANT:")
    assert question_prompt("what <image> ?", 1).endswith("USER: <image>\nwhat  ? ASSISTANT:")


def test_the_space_before_an_answer_counts_where_it_is_a_token_of_its_own(pictures):
    """As in LLaVA's masks: Llama's tokenizer joins it to letters, and not to digits."""
    merges = [("▁", "t"), ("▁t", "w"), ("▁tw", "o")]
    known = ["<unk>", "</s>", "▁", *string.printable, *("".join(pair) for pair in merges)]
    llama = Tokenizer(models.BPE({word: number for number, word in enumerate(dict.fromkeys(known))}, merges))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    collator = LlavaCollator(SimpleNamespace(tokenizer=tokenizer))
    for answer, counted in (("two", ["▁two", "</s>"]), ("2", ["▁", "2", "</s>"])):
        labels = collator([(parse_record(record("how many ?", answer, image=None), pictures), None)])["labels"][0]
        assert tokenizer.convert_ids_to_tokens(labels[labels != IGNORED]) == counted


def test_an_image_s_cls_token_counts_where_the_language_model_gets_it(checkpoint, pictures):
    for strategy in ("default", "full"):
        options = dict(thresholds={}, vision_feature_select_strategy=strategy)
        processor = LlavaAptProcessor.from_pretrained(checkpoint, **options)
        dataset = LlavaDataset([record()], pictures, processor)
        assert dataset.lengths == [LlavaCollator(processor)([dataset[0]])["input_ids"].shape[1]]


def test_loss_counts_the_answers_and_their_end_only(processor, pictures):
    words = processor.tokenizer
    turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "a cat"}]
    turns += [{"from": "human", "value": "left right ?"}, {"from": "gpt", "value": "yes"}]
    conversation = parse_record({"id": "x", "image": "1.png", "conversations": turns}, pictures)
    text = parse_record(record("what ?", "no", image=None), pictures)
    features = processor.image_processor([photo(1)], return_tensors="pt")
    batch = LlavaCollator(processor)([(conversation, features), (text, None)])
    labels = batch["labels"]
    assert words.decode(labels[0][labels[0] != IGNORED]) == "a cat </s> yes </s>"
    assert words.decode(labels[1][labels[1] != IGNORED]) == "no </s>"
    counted = labels != IGNORED
    assert torch.equal(labels[counted], batch["input_ids"][counted])
    assert not counted[batch["attention_mask"] == 0].any()
    assert batch["attention_mask"][1, 0] == 1 and batch["attention_mask"][1, -1] == 0  # padded on the right
    assert (batch["input_ids"] == IMAGE).sum() == processor.replace_image_token(batch, 0).count("<image>") < CELLS


def test_images_come_first_in_their_question(pictures):
    conversation = parse_record(record("what is <image> this ?"), pictures)
    assert conversation.turns == (("<image>\nwhat is  this ?", "a cat"),)


# ---------------------------------------------------------------------------------------- records


def test_a_leading_answer_is_dropped_as_llava_does(pictures):
    good = record()
    good["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    assert isinstance(parse_record(good, pictures), Conversation)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (record(image="nowhere.png"), "missing image"),
        (record("<image> <image>"), "2 <image> for 1 images"),
        (record("what ?"), "0 <image> for 1 images"),
        (record("<image> what ?", image=None), "1 <image> for 0 images"),
        (record(answer="<image>"), "<image> in an answer"),
        (record(conversations=[]), "roles must alternate human, gpt; found none"),
        (record(conversations=[{"from": "human", "value": "<image>"}]), "found human"),
        (
            record(conversations=[{"from": "user", "value": "<image>"}, {"from": "gpt", "value": "a"}]),
            "found user, gpt",
        ),
        (record(conversations=[{"value": "<image>"}]), "list of {from, value}"),
        (record(conversations="hello"), "list of {from, value}"),
        (record(conversations=5), "list of {from, value}"),
        (record(conversations=[None, None]), "list of {from, value}"),
        (record(conversations=[{"from": "human", "value": None}]), "list of {from, value}"),
        (record(conversations=[{"from": 1, "value": "<image>"}, {"from": 2, "value": "a"}]), "found 1, 2"),
        (record("<image> \ud800 ?"), "half a surrogate pair"),
        (record(image=5), "a path or a list of paths, found 5"),
        (record(image=["0.png", None]), "a path or a list of paths, found ['0.png', None]"),
        (record(image={"0.png": 1}), "a path or a list of paths, found {'0.png': 1}"),
        (record(image="n" * 5000), "impossible image name"),
        (record(image="a\0b.png"), "a\0b.png"),
        (record(image="\ud800.png"), "impossible image name"),
        (record(image="."), "missing image"),
        (record(image="/etc/hostname"), "leads out of --image-folder; --allow-outside-images permits that"),
        (record(image="../0.png"), "leads out of --image-folder"),
        (record(image="to_a_file.png"), "leads out of --image-folder"),
        (record(image="to_a_folder/0.png"), "leads out of --image-folder"),
        (record("<image> " + "what " * 200), "it loses images or answers"),
    ],
)
def test_bad_records_are_left_out_and_named(processor, pictures, bad, reason):
    dataset = LlavaDataset([bad, {**record(), "id": "good"}], pictures, processor, max_length=200)
    assert [conversation.id for conversation in dataset.conversations] == ["good"]
    assert len(dataset.bad) == 1 and dataset.bad[0].id == "x" and reason in dataset.bad[0].reason
    assert len(dataset.bad[0].reason) < 1000
    assert json.loads(json.dumps(vars(dataset.bad[0])).encode()) == vars(dataset.bad[0])


@pytest.mark.parametrize("bad", [None, 5, "hello", [], ["id"]])
def test_what_is_no_record_is_left_out(processor, pictures, tmp_path, bad):
    (tmp_path / "data.json").write_text(json.dumps([bad, record(), bad]))
    dataset = LlavaDataset(subset(read_records(tmp_path / "data.json"), 1), pictures, processor)
    assert len(dataset) == 1 and len(dataset.bad) == 2 and "a record must be" in dataset.bad[0].reason


@pytest.mark.parametrize("identity", ["n" * 5000, "\ud800", {"a": [1]}, None, 3.5])
def test_ids_of_any_kind_can_be_written(processor, pictures, identity):
    bad = parse_record({**record(image="nowhere.png"), "id": identity}, pictures)
    assert len(bad.id.encode()) < 300


def test_images_outside_of_the_folder_are_read_when_that_is_permitted(pictures):
    for name in ("to_a_file.png", "to_a_folder/0.png", str(pictures / "to_a_file.png")):
        assert isinstance(parse_record(record(image=name), pictures), BadRecord)
        assert isinstance(parse_record(record(image=name), pictures, allow_outside_images=True), Conversation)
    for name in ("to_another.png", str(pictures / "0.png"), "to_a_folder/../0.png"):  # the last: outside, by the link
        assert isinstance(parse_record(record(image=name), pictures), Conversation) == ("to_a_folder" not in name)


def test_over_long_conversations_are_cut_behind_the_first_answer(processor, pictures):
    long = record()
    long["conversations"] += [{"from": "human", "value": "what " * 100}, {"from": "gpt", "value": "no"}]
    dataset = LlavaDataset([long], pictures, processor, max_length=150)
    assert dataset.cut == ["x"] and dataset.lengths == [150] and not dataset.bad
    batch = LlavaCollator(processor, max_length=150)([dataset[0]])
    assert batch["input_ids"].shape[1] <= 150
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "a cat </s>"


def test_a_conversation_whose_first_answer_would_be_cut_is_left_out(processor, pictures):
    dataset = LlavaDataset([record(answer="cat " * 200, id="long"), record()], pictures, processor, max_length=150)
    assert [bad.id for bad in dataset.bad] == ["long"] and not dataset.cut
    assert dataset.bad[0].reason.endswith("cut to 150 it loses images or answers")


def test_useless_data_is_refused(processor, pictures, tmp_path):
    with pytest.raises(ValueError, match="none of 1 records can be used; the first: x: missing image"):
        LlavaDataset([record(image="nowhere.png")], pictures, processor)
    useless = {"{": "is no JSON file", "[" * 100_000: "is no JSON file", "{}": "must hold", "[]": "must hold"}
    for content, message in useless.items():
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / "data.json")


# ---------------------------------------------------------------------------------------- images of all kinds


def png_of(width, height) -> bytes:
    """A PNG of one colour, written without its pixels: 60,000 of them are some hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9) if width * height < 10**8 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = encoded(photo(), "JPEG"), encoded(photo(), "PNG")
UNREADABLE = {
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty": (b"", "cannot identify"),
    "text": (b"<html></html>", "cannot identify"),
    "eps": (encoded(photo(), "EPS"), "cannot identify"),  # PIL would start Ghostscript
    "float": (encoded(Image.new("F", (50, 50)), "TIFF"), "floating point"),
    "narrow": (png_of(1, 60_000), "1 x 60000 pixels, padded to a square, has more"),
    "bomb": (png_of(20_000, 20_000), "decompression bomb"),
    "large": (png_of(11_000, 10_000), "11000 x 10000 pixels are more than 100000000"),
    "broken png": (PNG[:200] + b"\0" * 50 + PNG[250:], "unrecognized data stream|broken PNG"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
}
UNUSUAL = {
    "wrong extension": encoded(photo(), "PNG"),
    "cmyk": encoded(photo().convert("CMYK"), "JPEG"),
    "palette": encoded(photo().convert("P"), "PNG"),
    "sixteen": encoded(Image.fromarray(np.full((40, 60), 40_000, np.uint16)), "PNG"),
    "alpha": encoded(photo().convert("RGBA"), "PNG"),
    "grey alpha": encoded(photo().convert("LA"), "PNG"),
    "one bit": png_of(50, 50),
    "exif": encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "animated": encoded(photo(0), "GIF", save_all=True, append_images=[photo(1)]),
    "one pixel": png_of(1, 1),
    "thin": png_of(1, 4000),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_used_is_replaced_and_named(processor, tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval, of other tests, sets it for all
    content, reason = UNREADABLE[kind]
    (tmp_path / "bad.jpg").write_bytes(content)
    photo().save(tmp_path / "good.png")
    records = [{**record(image="bad.jpg"), "id": "bad"}, {**record(image="good.png"), "id": "good"}]
    dataset = LlavaDataset(records, tmp_path, processor)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert dataset[0][0].id == "good" and dataset.unreadable.tolist() == [True, False]
    assert re.search(f"record bad: unreadable image.*bad.jpg: .*({reason})", caplog.text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 300_000  # KB
    with pytest.raises(ValueError, match="no image of the data can be read"):
        LlavaDataset(records[:1], tmp_path, processor)[0]
    with pytest.raises(ValueError, match=r"1 bad records, 0 are allowed; bad: unreadable image: .*bad\.jpg"):
        LlavaDataset(records, tmp_path, processor, max_bad=0)[0]


def test_records_that_are_bad_and_those_that_turn_out_to_be_count_together(processor, pictures):
    records = [record(image="nowhere.png"), record(image="broken.jpg"), record(), record(image="broken.jpg")]
    dataset = LlavaDataset(records, pictures, processor, max_bad=2)
    assert dataset[0][0].images[0].name == dataset[0][0].images[0].name == "0.png"
    with pytest.raises(ValueError, match="3 bad records, 2 are allowed"):
        dataset[2]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_images_are_used(processor, tmp_path, kind):
    (tmp_path / "unusual.jpg").write_bytes(UNUSUAL[kind])
    dataset = LlavaDataset([record(image="unusual.jpg")], tmp_path, processor)
    batch = LlavaCollator(processor)([dataset[0]])
    assert batch["pixel_values"].shape == (1, 3, 112, 112) and batch["pixel_values"].isfinite().all()
    assert not dataset.unreadable.any()


# ---------------------------------------------------------------------------------------- which, and in what order


def test_subset_is_stratified_and_always_the_same():
    records = [{"id": i, **({"image": "x"} if i % 4 else {})} for i in range(4000)]
    chosen = subset(records, 0.05)
    assert len(chosen) == 200 and sum("image" in item for item in chosen) == 150
    assert chosen == subset(records, 0.05) and chosen != subset(records, 0.05, seed=1)
    assert [item["id"] for item in chosen] == sorted(item["id"] for item in chosen)
    assert subset(records, 1.0) == records
    with pytest.raises(ValueError, match="fraction is 5"):
        subset(records, 5)


def test_batches_hold_one_modality_and_similar_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (1000,), generator=generator).tolist()
    has_image = (torch.rand(1000, generator=generator) < 0.7).tolist()
    sampler = ModalityGroupedSampler(lengths, has_image, megabatch=40)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) and order == list(sampler)
    sampler.set_epoch(1)
    assert order != list(sampler)
    batches = [order[start : start + 8] for start in range(0, 1000 - 80, 8)]
    assert all(len({has_image[i] for i in batch}) == 1 for batch in batches)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 150  # unsorted: about 390
    assert len({has_image[batch[0]] for batch in batches[:20]}) == 2  # the modalities alternate


def test_worker_processes_tell_what_they_could_not_read(processor, pictures):
    records = [{**record(image="broken.jpg"), "id": "broken"}, {**record(), "id": "good"}]
    dataset = LlavaDataset(records, pictures, processor)
    list(DataLoader(dataset, 2, num_workers=1, collate_fn=LlavaCollator(processor)))
    assert dataset.unreadable.tolist() == [True, False]
