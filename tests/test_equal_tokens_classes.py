"""Classification at equal tokens: images are tested by heads that did not learn from them, gains are over the curve."""

import json
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import equal_tokens_classes as classes
from benchmarks import study
from benchmarks.study import Setting
from tests.scorers import save_scorer


@pytest.fixture
def data(tmp_path):
    """Twelve pictures of two classes, dark and bright, half of each smooth."""
    chance = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "photos" / classes.SPLITS[number % 3] / ["bright", "dark"][number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 100, (56, 60, 3), np.uint8) + 100 * (number % 2 == 0)
        pixels[:, :30] = 50
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    options = dict(depth=2, embed_dim=24, num_heads=2, num_classes=0, img_size=56, dynamic_img_size=True)
    network = timm.create_model("vit_small_patch14_dinov2", **options).eval()
    monkeypatch.setattr(study, "pretrained", lambda weights: deepcopy(network))
    sizes = dict(BASE=(56, 56), OTHERS=((84, 84),), SMALLER=((28, 28), (42, 42)))
    training = dict(UNLABELLED=1, RANK=2, STEPS=2, VIEWS_OF_A_STEP=2)
    for name, value in dict(**sizes, **training, BUDGETS=(0.5, 0.625), FOLDS=2, DRAWS=4).items():
        monkeypatch.setattr(classes, name, value)


def test_all_of_it_runs_and_resumes(data, small, tmp_path, monkeypatch):
    scorer = save_scorer(tmp_path / "scorer.safetensors", 14)
    out = tmp_path / "found.json"
    arguments = [data, "--scorer", scorer, "--work-dir", tmp_path / "work", "--out", out, "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["equal_tokens_classes", *map(str, arguments)])
    classes.main()
    found = json.loads(out.read_text())
    assert found["images"] == 11, "from one of twelve the adapters learned"
    assert {line["pool"] for line in found["results"]} == set(classes.POOLS)
    plain = [line for line in found["results"] if not line["adapters"]]
    assert len(found["results"]) - len(plain) == 2 * 2 * len(classes.POOLS), "of two base sizes"
    assert sum(line["method"] == "lora" for line in plain) == 2 * len(classes.POOLS)
    by_name = {(line["method"], line["scorer"], line["image"], line["pool"]): line for line in plain}
    assert by_name["dense", None, "42x42", "cls"]["tokens"] == 9
    entropy = by_name["apt", "entropy", "56x56", "cls"]
    assert entropy["tokens"] == 10 and entropy["accuracy_gain"] is not None
    assert all(line["ms"] > 0 for line in found["results"]) and out.with_suffix(".png").is_file()
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "features").iterdir()}
    expected = 4 + 2 + 2 + 2 * 2 + 4  # dense, LoRA; learned, adapters; entropy, upsample_mse, random, ToMe
    assert len(features) == expected
    classes.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "features").iterdir()} == features
    assert json.loads(out.read_text()) == found


def test_without_a_learned_scorer_there_are_no_adapters(data, small, tmp_path, monkeypatch):
    arguments = [data, "--work-dir", tmp_path / "work", "--out", tmp_path / "found.json", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["equal_tokens_classes", *map(str, arguments)])
    classes.main()
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert {line["method"] for line in found} == {"dense", "lora", "apt", "random", "tome"}
    assert not any(line["adapters"] or line["scorer"] == "learned" for line in found)


@torch.inference_mode()
def test_tome_pools_as_the_network_where_nothing_merges(data, small, tmp_path):
    of_small = classes.ClassStudy(data, None, None, tmp_path, torch.float32)
    images = torch.randn(2, 3, 56, 56)
    of_all = of_small.pooled(Setting("tome", (56, 56), None, 16), images)
    for ours, theirs in zip(of_all, of_small.pooled(Setting("dense", (56, 56)), images)):
        torch.testing.assert_close(ours, theirs, check_dtype=False)
    _, by_area, by_token, tokens = of_small.pooled(Setting("tome", (56, 56), None, 12), images)
    assert tokens.tolist() == [12, 12], "4 merge in each of two blocks: 16 and 12 before, 12 and 8 after merging"
    assert not torch.allclose(by_area, by_token)


def test_missing_splits_are_named(data, small, tmp_path):
    (data / "test").rename(data / "spare")
    with pytest.raises(FileNotFoundError, match="photos lacks test: it needs a folder per class in each"):
        classes.ClassStudy(data, None, None, tmp_path, torch.float32)


def test_nobody_is_tested_by_a_head_that_knows_it(data, small, tmp_path, monkeypatch):
    of_small = classes.ClassStudy(data, None, None, tmp_path, torch.float32)
    learned_from = []
    original = classes.train_head

    def train_head(x, labels, num_classes):
        learned_from.append(x)
        return original(x, labels, num_classes)

    monkeypatch.setattr(classes, "train_head", train_head)
    dense = Setting("dense", classes.BASE)
    found = of_small.probabilities([dense])
    assert {key[1] for key in found} == set(classes.POOLS) and found[dense, "cls"].shape == (12, 2)
    features, folds = of_small.features(dense), of_small.folds()
    for pool, parts in zip(classes.POOLS, zip(learned_from[::2], learned_from[1::2])):
        for fold, x in enumerate(parts):
            assert torch.equal(x, features[pool][folds != fold])


def test_gains_are_over_the_dense_curve():
    right = torch.tensor([[1.0, 1, 0, 0], [0.2, 0.2, 0.4, 0.4]])
    curve = [(100, right), (200, torch.tensor([[1.0, 1, 1, 0], [0.2, 0.2, 0.2, 0.4]]))]
    setting = Setting("apt", (56, 56), "learned", 150)
    entry = classes.entry_of(setting, "cls", 150.0, curve, torch.tensor([[1.0, 1, 1, 1], [0.1, 0.1, 0.1, 0.1]]))
    assert (entry["accuracy"], entry["accuracy_gain"]) == (100, 37.5) and entry["accuracy_error"] > 0
    assert (entry["cross_entropy"], entry["cross_entropy_gain"]) == (0.1, -0.175)
    assert classes.entry_of(setting, "cls", 250.0, curve, right)["accuracy_gain"] is None
    assert classes.entry_of(Setting("dense", (28, 28)), "cls", 100.0, curve, right)["accuracy_gain"] is None
