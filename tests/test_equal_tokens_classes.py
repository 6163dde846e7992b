"""Classification at equal tokens: images are tested by heads that did not learn from them, gains are over the curve."""

import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import equal_tokens_classes as classes
from benchmarks import grocery, study
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
    sizes = dict(BASE=(56, 56), OTHERS=((84, 84),), SMALLER=((28, 28), (42, 42)), TUNED=((28, 28), (42, 42)))
    training = dict(UNLABELLED=2, COPIES=2, RANK=2, VIEWS_OF_A_STEP=2)
    for name, value in dict(**sizes, **training, BUDGETS=(0.5, 0.625), FOLDS=2, DRAWS=4).items():
        monkeypatch.setattr(classes, name, value)
    for name in ("RANK", "STEPS"):
        monkeypatch.setattr(study, name, 2)


def test_all_of_it_runs_and_resumes(data, small, tmp_path, monkeypatch):
    other = save_scorer(tmp_path / "other.safetensors", 14)
    out = tmp_path / "found.json"
    arguments = [data, "--also", other, "--work-dir", tmp_path / "work", "--out", out, "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["equal_tokens_classes", *map(str, arguments)])
    classes.main()
    found = json.loads(out.read_text())
    assert found["images"] == 10, "from two of twelve the scorer and the adapters learned"
    assert {line["pool"] for line in found["results"]} == set(classes.POOLS)
    plain = [line for line in found["results"] if not line["adapters"]]
    assert len(found["results"]) - len(plain) == (2 + 1) * len(classes.POOLS), "of two base sizes"
    assert sum(line["method"] == "lora" for line in plain) == 2 * len(classes.POOLS)
    by_name = {(line["method"], line["scorer"], line["image"], line["pool"]): line for line in plain}
    assert by_name["dense", None, "42x42", "cls"]["tokens"] == 9
    entropy = by_name["apt", "entropy", "56x56", "cls"]
    assert entropy["tokens"] == 10 and entropy["accuracy_over_dense"] is not None
    assert entropy["divergence"] > 0 == by_name["dense", None, "56x56", "cls"]["divergence"]
    assert all(line["ms"] > 0 for line in found["results"]) and out.with_suffix(".png").is_file()
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "photos" / "features").iterdir()}
    assert by_name["apt", "other", "56x56", "cls"]["tokens"] > 0
    # Dense, once of every image, and LoRA; learned, with adapters; entropy, upsample_mse, random, ToMe; the other.
    expected = 4 + 1 + 2 + 2 + 2 + 1 + 4 + 1
    assert len(features) == expected
    classes.main()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "photos" / "features").iterdir()} == features
    assert json.loads(out.read_text()) == found


def test_officially_the_test_split_is_tested_by_a_head_of_all_others(data, small, tmp_path, monkeypatch):
    (data / "validation" / "bright").rename(tmp_path / "spare")  # its classes are those of train all the same
    official = classes.ClassStudy(data, True, None, tmp_path, torch.float32)
    assert official.labels.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    learned_from, dense = [], Setting("dense", classes.BASE)
    original = classes.train_head
    monkeypatch.setattr(
        classes, "train_head", lambda x, labels, count: learned_from.append(labels) or original(x, labels, count)
    )
    found = official.probabilities([dense])[dense, "cls"]
    assert official.tested.tolist() == [6, 7, 8, 9] and found.shape == (4, 2)
    assert all(labels.tolist() == [0, 0, 1, 1, 1, 1] for labels in learned_from)


def test_the_scorer_learns_from_images_that_nobody_is_tested_on(data, small, tmp_path):
    of_small = classes.ClassStudy(data, False, None, tmp_path, torch.float32)
    (training,), (held_out,) = of_small.views("train"), of_small.views("val")
    assert len(training.pixels) == len(held_out.pixels) == 2, "two copies of one image each"
    assert training.losses[28].shape == (2, 2, 2) and (training.losses[28] > 0).all()
    assert len(of_small.tested) == 10 and set(range(4, 12)) < set(of_small.tested.tolist())


def test_the_run_that_trains_lora_measures_what_it_trained(data, small, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RATE", 0.1)
    setting, found = Setting("lora", classes.SMALLER[0]), []
    for name in ("trains", "resumes"):
        study_of = classes.ClassStudy(data, False, None, tmp_path / name, torch.bfloat16)
        found.append(study_of.features(setting)["cls"])
        (tmp_path / "resumes").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "trains" / "smaller.safetensors", tmp_path / "resumes")
    assert torch.equal(*found)
    assert not torch.equal(found[0], study_of.features(Setting("dense", classes.SMALLER[0]))["cls"])


def test_grocery_is_arranged_by_its_lists(tmp_path):
    for split, name in (("train", "Fruit/Kiwi"), ("val", "Fruit/Kiwi"), ("test", "Packages/Milk/Oat")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").write_bytes(b"picture")
        (tmp_path / f"{split}.txt").write_text(f"{split}/{name}/1.jpg, {3 if 'Kiwi' in name else 12}, 0\n")
    grocery.arrange(tmp_path, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jpg")}
    assert found == {"train/03_Kiwi/1.jpg", "validation/03_Kiwi/1.jpg", "test/12_Oat/1.jpg"}
    with pytest.raises(
        FileNotFoundError, match=r"out lacks train\.txt, val\.txt, test\.txt: give the repository's folder"
    ):
        grocery.arrange(tmp_path / "out", tmp_path)


def test_what_is_measured_as_well_is_timed_as_well(data, small, tmp_path):
    of_small = classes.ClassStudy(data, False, None, tmp_path, torch.float32)
    settings = [Setting("dense", size) for size in classes.SMALLER]
    alone = of_small.times(settings[:1])
    both = of_small.times(settings)
    assert set(both) == {setting.name for setting in settings}
    assert of_small.times(settings[:1]) == alone and of_small.times(settings) == both, "kept"
    tuned = settings[0]._replace(method="lora")
    assert of_small.times([*settings, tuned])[tuned.name] == both[settings[0].name], "LoRA is merged"


@torch.inference_mode()
def test_tome_pools_as_the_network_where_nothing_merges(data, small, tmp_path):
    of_small = classes.ClassStudy(data, False, None, tmp_path, torch.float32)
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
        classes.ClassStudy(data, False, None, tmp_path, torch.float32)


def test_steps_that_were_made_of_something_else_are_not_taken(data, small, tmp_path, monkeypatch):
    classes.ClassStudy(data, False, None, tmp_path, torch.float32)
    classes.ClassStudy(data, False, None, tmp_path, torch.float32)
    for official, dtype, differ in ((True, torch.float32, "official"), (False, torch.bfloat16, "dtype")):
        with pytest.raises(ValueError, match=f"were made with other {differ}; give another --work-dir"):
            classes.ClassStudy(data, official, None, tmp_path, dtype)
    (data / "test/dark/new.png").write_bytes(next(data.glob("test/dark/*.png")).read_bytes())
    with pytest.raises(ValueError, match="were made with other images"):
        classes.ClassStudy(data, False, None, tmp_path, torch.float32)


@pytest.mark.parametrize("files", [["a/scorer.safetensors", "b/scorer.safetensors"], ["learned.safetensors"]])
def test_scorers_that_the_results_could_not_tell_apart_are_refused(files, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["equal_tokens_classes", "photos", "--also", *files])
    with pytest.raises(SystemExit):
        classes.main()
    assert "the files need names of their own" in capsys.readouterr().err


def test_nobody_is_tested_by_a_head_that_knows_it(data, small, tmp_path, monkeypatch):
    of_small = classes.ClassStudy(data, False, None, tmp_path, torch.float32)
    learned_from = []
    original = classes.train_head

    def train_head(x, labels, num_classes):
        learned_from.append(x)
        return original(x, labels, num_classes)

    monkeypatch.setattr(classes, "train_head", train_head)
    dense = Setting("dense", classes.BASE)
    found = of_small.probabilities([dense])
    assert {key[1] for key in found} == set(classes.POOLS) and found[dense, "cls"].shape == (10, 2)
    features, folds = of_small.features(dense, every=True), of_small.folds()
    for pool, parts in zip(classes.POOLS, zip(learned_from[::2], learned_from[1::2])):
        for fold, x in enumerate(parts):
            assert torch.equal(x, features[pool][folds != fold])


def test_gains_are_over_the_dense_curve():
    few = torch.tensor([[1.0, 1, 0, 0], [0.2, 0.2, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    many = torch.tensor([[1.0, 1, 1, 0], [0.2, 0.2, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0]])
    curves = {"dense": [(100, few), (200, many)], "lora": [(100, many), (200, many)]}
    setting, found = Setting("apt", (56, 56), "learned", 150), torch.tensor([[1.0] * 4, [0.1] * 4, [0.03] * 4])
    entry = classes.entry_of(setting, "cls", 150.0, curves, found)
    assert (entry["accuracy"], entry["accuracy_over_dense"], entry["accuracy_over_lora"]) == (100, 37.5, 25)
    assert entry["accuracy_over_dense_error"] > 0
    assert (entry["cross_entropy"], entry["cross_entropy_over_dense"]) == (0.1, -0.175)
    assert (entry["divergence"], entry["divergence_over_lora"]) == (0.03, 0.03)
    assert classes.entry_of(setting, "cls", 250.0, curves, found)["accuracy_over_dense"] is None
    dense, lora = (classes.entry_of(Setting(kind, (28, 28)), "cls", 100.0, curves, found) for kind in curves)
    assert dense["accuracy_over_dense"] is dense["accuracy_over_lora"] is lora["accuracy_over_lora"] is None
    assert lora["accuracy_over_dense"] == 50


def test_what_is_measured_of_an_image():
    probabilities, dense = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    right, cross_entropy, divergence = classes.values_of(probabilities, torch.tensor([0, 1]), dense)
    assert right.tolist() == [1, 0]
    torch.testing.assert_close(cross_entropy, -torch.tensor([0.75, 0.5]).log())
    kullback_leibler = torch.nn.functional.kl_div(probabilities.log(), dense, reduction="none").sum(1)
    torch.testing.assert_close(divergence, kullback_leibler)
