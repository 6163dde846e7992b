"""LLaVA's data: what is asked, what the loss counts, which samples meet in a batch, and what is refused."""

import pytest
import torch
from torch.utils.data import DataLoader

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

from .llava_tiny import CELLS, photo, save_hub_checkpoint

IMAGE = 4  # the tokenizer's id of <image>


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_hub_checkpoint(folder)
    return LlavaAptProcessor.from_pretrained(folder, thresholds={28: 2.0}, do_pad=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        photo(index).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
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
    assert [text for text, is_answer in pieces if is_answer] == ["a cat</s>"]
    assert question_prompt("what ?", 2).endswith("USER: <image>\n<image>\nwhat ? ASSISTANT:")
    assert question_prompt("what <image> ?", 1).endswith("USER: <image>\nwhat  ? ASSISTANT:")


def test_loss_counts_the_answers_and_their_end_only(processor, pictures):
    words = processor.tokenizer
    turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": "a cat"}]
    turns += [{"from": "human", "value": "left right ?"}, {"from": "gpt", "value": "yes"}]
    conversation = parse_record({"id": "x", "image": "1.png", "conversations": turns}, pictures)
    text = parse_record(record("what ?", "no", image=None), pictures)
    batch = LlavaCollator(processor)([(conversation, [photo(1)]), (text, [])])
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
        (record("<image> " + "what " * 200), "it loses images or answers"),
    ],
)
def test_bad_records_are_left_out_and_named(processor, pictures, bad, reason):
    dataset = LlavaDataset([bad, {**record(), "id": "good"}], pictures, processor, max_length=200)
    assert [conversation.id for conversation in dataset.conversations] == ["good"]
    assert len(dataset.bad) == 1 and dataset.bad[0].id == "x" and reason in dataset.bad[0].reason


def test_over_long_conversations_are_cut_behind_the_first_answer(processor, pictures):
    long = record()
    long["conversations"] += [{"from": "human", "value": "what " * 100}, {"from": "gpt", "value": "no"}]
    dataset = LlavaDataset([long], pictures, processor, max_length=150)
    assert dataset.cut == ["x"] and dataset.lengths == [150] and not dataset.bad
    batch = LlavaCollator(processor, max_length=150)([dataset[0]])
    assert batch["input_ids"].shape[1] <= 150
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "a cat </s>"


def test_unreadable_images_are_replaced_and_counted(processor, pictures):
    records = [{**record(image="broken.jpg"), "id": "broken"}, {**record(), "id": "good"}]
    dataset = LlavaDataset(records, pictures, processor)
    assert dataset[0][0].id == "good"
    assert dataset.unreadable.tolist() == [True, False]
    with pytest.raises(ValueError, match="no image of the data can be read"):
        LlavaDataset(records[:1], pictures, processor)[0]


def test_useless_data_is_refused(processor, pictures, tmp_path):
    with pytest.raises(ValueError, match="none of 1 records can be used; the first: x: missing image"):
        LlavaDataset([record(image="nowhere.png")], pictures, processor)
    for content, message in (("{", "is no JSON file"), ("{}", "must hold a list"), ("[]", "must hold a list")):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / "data.json")


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


def test_a_loader_runs_through_it_all(processor, pictures):
    records = [{**record(image=f"{i % 3}.png"), "id": i} for i in range(5)] + [record("what ?", image=None)] * 3
    dataset = LlavaDataset(records, pictures, processor)
    sampler = ModalityGroupedSampler(dataset.lengths, dataset.has_image, 2)
    loader = DataLoader(dataset, 2, sampler=sampler, collate_fn=LlavaCollator(processor))
    seen = [("pixel_values" in batch, len(batch["input_ids"])) for batch in loader]
    assert len(seen) == 4 and sum(count for _, count in seen) == 8


def test_bad_records_are_plain_data():
    assert vars(BadRecord("a", "b")) == {"id": "a", "reason": "b"}
