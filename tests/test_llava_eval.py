"""lmms-eval with the model llava_apt, run offline as its own evaluator runs it, on a tiny random LLaVA."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.registry_v2 import ModelRegistryV2

from examples import photoshapes_vqa_results
from examples.report import AFTER, BEFORE, DENSE
from llava_apt.lmms_eval_plugin import MANIFEST, LlavaAptChat, LlavaAptSimple, parse_thresholds
from llava_apt.new_layers import FILE_NAME
from llava_apt.prompt import question_prompt
from tools import compare

from .llava_tiny import CELLS, PATCH, photo
from .scorers import save_scorer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """PhotoShapes' validation questions, six of them, about three images."""
    folder = tmp_path_factory.mktemp("photoshapes")
    records = []
    for index, kind in enumerate(("yes/no", "shape", "colour", "count", "position", "yes/no")):
        name = f"{index // 2}.png"
        photo(index // 2, flat=index / 6).save(folder / name)
        answer = ["cat", "dog", "yes"][index % 3]
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"q{index}", "image": name, "question_type": kind, "conversations": turns})
    for split in ("training", "validation"):
        (folder / f"vqa_{split}.json").write_text(json.dumps(records))
    return folder


def model(checkpoint, cls=LlavaAptSimple, **options):
    return cls(pretrained=str(checkpoint), thresholds="28=2", batch_size=4, device="cpu", pad=True, **options)


def requests(kind, count=6, **settings):
    """What lmms-eval hands a model: a question about an image of its own for each document."""
    docs = [{"question": f"what {'is ' * (i % 3)}this ?", "image": photo(i, flat=i / 6)} for i in range(count)]
    for i, doc in enumerate(docs):
        if kind == "loglikelihood":
            arguments = (doc["question"], "a cat" if i % 2 else "no", lambda doc: [doc["image"]], i, "task", "test")
        elif kind == "chat":
            arguments = (doc["question"], messages, settings, i, "task", "test")
        else:
            arguments = (doc["question"], settings, lambda doc: [doc["image"]], i, "task", "test")
        yield docs, Instance("generate_until", arguments, i, {"task": "task", "doc_id": i, "repeats": 1})


def messages(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def prepare(lm, kind, **settings):
    docs, instances = zip(*requests(kind, **settings))
    lm.task_dict = {"task": {"test": docs[0]}}
    return docs[0], list(instances)


def answer_alone(lm, image, question, max_new_tokens):
    """What the model answers by transformers' own ``generate``."""
    inputs = lm.processor(images=image, text=question_prompt(question, 1), return_tensors="pt")
    out = lm.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return lm.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_lmms_eval_finds_the_model_by_its_entry_point():
    setup = (ROOT / "setup.py").read_text()
    assert '"lmms_eval.models": ["llava_apt = llava_apt.lmms_eval_plugin:MANIFEST"]' in setup
    point = importlib.metadata.EntryPoint("llava_apt", "llava_apt.lmms_eval_plugin:MANIFEST", "lmms_eval.models")
    assert point.load() is MANIFEST
    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("llava_apt") is LlavaAptChat
    assert registry.get_model_class("llava_apt", force_simple=True) is LlavaAptSimple


def test_offline_task_scores_as_counted_by_hand(checkpoint, data):
    with photoshapes_vqa_results.task_manager(data) as manager:
        results = simple_evaluate(model(checkpoint), tasks=["photoshapes_vqa"], task_manager=manager)
    compared = compare.read_lmms_eval("of this test", results)
    assert 0 < compared.tokens <= CELLS and compared.speed > 0
    lm, correct = model(checkpoint), []
    for record in json.loads((data / "vqa_validation.json").read_text()):
        image = photoshapes_vqa_results.load(data, record["image"])
        correct.append(answer_alone(lm, image, "what is this ?", 4) == record["conversations"][1]["value"])
    accuracy = results["results"]["photoshapes_vqa"]
    assert accuracy["accuracy,none"] == pytest.approx(sum(correct) / 6)
    assert accuracy["accuracy yes/no,none"] == pytest.approx((correct[0] + correct[5]) / 2)


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_batched_answers_are_those_of_one_by_one_in_order(checkpoint, kind):
    lm = model(checkpoint, LlavaAptChat if kind == "chat" else LlavaAptSimple)
    docs, instances = prepare(lm, kind, max_new_tokens=5)
    answers = [result.text for result in lm.generate_until(instances)]
    for doc, answer in zip(docs, answers, strict=True):
        assert answer == answer_alone(lm, doc["image"], doc["question"], 5)


def test_placeholders_in_a_chat_tasks_text_are_not_doubled(checkpoint):
    lm = model(checkpoint, LlavaAptChat)
    docs, instances = prepare(lm, "chat", max_new_tokens=5)
    expected = [result.text for result in lm.generate_until(instances)]
    for doc in docs:
        doc["question"] = f"<image>\n{doc['question']}"
    assert [result.text for result in lm.generate_until(instances)] == expected


def test_answers_end_where_the_task_says(checkpoint):
    lm = model(checkpoint)
    _, instances = prepare(lm, "simple", max_new_tokens=5, min_new_tokens=5)
    whole = [result.text for result in lm.generate_until(instances)]
    word = whole[0].split(" ")[1]
    _, instances = prepare(lm, "simple", max_new_tokens=5, min_new_tokens=5, until=[word])
    assert [result.text for result in lm.generate_until(instances)] == [text.split(word)[0].strip() for text in whole]


def test_settings_that_tasks_have_for_other_models_change_nothing(checkpoint):
    lm = model(checkpoint)
    _, instances = prepare(lm, "simple", max_new_tokens=5)
    expected = [result.text for result in lm.generate_until(instances)]
    others = dict(image_aspect_ratio="original", seed=0, stop_sequences=["a"], interleaved_format=True)
    for settings in (others, dict(until=None), dict(temperature=None)):
        _, instances = prepare(lm, "simple", max_new_tokens=5, **settings)
        assert [result.text for result in lm.generate_until(instances)] == expected


def test_loglikelihood_is_that_of_the_continuation(checkpoint):
    lm = model(checkpoint)
    docs, instances = prepare(lm, "loglikelihood")
    for i, (doc, result) in enumerate(zip(docs, lm.loglikelihood(instances), strict=True)):
        end = "a cat" if i % 2 else "no"
        text = f"{question_prompt(doc['question'], 1)} {end}"
        inputs = lm.processor(images=doc["image"], text=text, return_tensors="pt")
        with torch.no_grad():
            logits = lm.model(**inputs).logits[0].log_softmax(-1)
        score, greedy = result.text
        ids = inputs["input_ids"][0]
        expected = sum(float(logits[-k - 1, ids[-k]]) for k in range(1, len(end.split()) + 1))
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(logits[-k - 1].argmax()) == int(ids[-k]) for k in range(1, len(end.split()) + 1))


def test_errors_are_raised_not_swallowed(checkpoint):
    """lmms-eval's own LLaVA turns them into empty answers, and the score into a lie."""
    lm = model(checkpoint)
    _, instances = prepare(lm, "simple", max_new_tokens=5)
    lm.task_dict["task"]["test"][3]["image"] = "a path"
    with pytest.raises(TypeError, match="takes images only"):
        lm.generate_until(instances)
    with pytest.raises(NotImplementedError):
        lm.generate_until_multi_round([])


def test_arguments():
    assert parse_thresholds("28=5.75;56=5") == {28: 5.75, 56: 5.0}
    assert parse_thresholds("off") == {} and parse_thresholds(None) is None
    with pytest.raises(ValueError, match="thresholds must look like"):
        parse_thresholds("5.75")


def test_table_has_every_variant_type_and_figure(checkpoint, data, tmp_path, monkeypatch, capsys):
    from llava_apt import LlavaAptForConditionalGeneration, save_new_layers

    tuned = LlavaAptForConditionalGeneration.from_pretrained(checkpoint, thresholds={28: 2})
    save_new_layers(tuned, tmp_path)
    arguments = [data, checkpoint, tmp_path, "--thresholds", "28=2", "--output", tmp_path / "results.json"]
    arguments += ["--rounds", 1, "--speed-samples", 4, "--work-dir", tmp_path / "work"]
    scorer = save_scorer(tmp_path / "scorer.safetensors", PATCH)
    arguments += ["--learned", scorer, "28=1", "--learned-layers", tmp_path / FILE_NAME, "--smaller", 84]
    monkeypatch.setattr("sys.argv", ["results", *map(str, arguments)])
    photoshapes_vqa_results.main()
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {row["title"]: row for row in report["rows"]}
    learned, unlabelled = "resizing, learned scorer", "APT, learned scorer, tuned without labels"
    small = "dense, smaller images, 84 px"
    of_paper = [DENSE, small, "random", "resizing", BEFORE, AFTER]
    assert list(rows) == [*of_paper, learned, unlabelled, "most frequent answer"]
    assert rows[small]["tokens"] == 36 and rows[learned]["tokens"] == rows[unlabelled]["tokens"] < CELLS
    assert rows["resizing"]["metrics"] == rows[BEFORE]["metrics"]  # ZeroMLP starts at zero
    assert rows[DENSE]["tokens"] == CELLS and rows[DENSE]["content_kept"] == 1
    assert len({rows[name]["tokens"] for name in ("random", "resizing", BEFORE, AFTER)}) == 1
    assert all(rows[name]["content_kept"] <= 1 for name in ("random", "resizing", BEFORE, AFTER))
    text = capsys.readouterr().out
    for name in (*rows, "position", "count", "per second", "content tokens kept", "Thresholds (entropy): 2 at 28 px"):
        assert name in text
    monkeypatch.setattr("sys.argv", ["results", *map(str, arguments), "--limit", "1"])
    with pytest.raises(ValueError, match=r"the first 1 questions lack .*position.*; raise --limit"):
        photoshapes_vqa_results.main()


def test_share_of_the_padding():
    share = photoshapes_vqa_results.content_share((640, 480), 8, 8)
    assert share.sum() == pytest.approx(64 * 0.75) and share[0].sum() == 0 and share[1].tolist() == [1.0] * 8
    assert photoshapes_vqa_results.content_share((100, 100), 8, 8).sum() == 64
