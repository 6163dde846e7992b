"""PhotoShapes: one set of scenes whose boxes, masks and answers agree, made the same way every time."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from apt_backbones import score_patches
from examples import make_photoshapes as photoshapes
from examples.new_folder import new_folder
from tests.scripts import wait_for

SCRIPT = Path(photoshapes.__file__)
SPLITS = {"training": 40, "validation": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    destination = tmp_path_factory.mktemp("data") / "photoshapes"
    photoshapes.make_photoshapes(destination, train=SPLITS["training"], val=SPLITS["validation"], size=256, seed=3)
    return destination


def load_coco(folder, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(folder / "annotations" / f"instances_{split}.json")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, **options)


# ------------------------------------------------------------------------------------------- what is in the folder


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_has_a_mask_and_a_record(folder, split):
    names = [f"{i:06d}" for i in range(1, SPLITS[split] + 1)]
    assert sorted(path.name for path in (folder / "images" / split).iterdir()) == [f"{n}.jpg" for n in names]
    assert sorted(path.name for path in (folder / "annotations" / split).iterdir()) == [f"{n}.png" for n in names]
    for record in load_coco(folder, split).dataset["images"]:
        with Image.open(folder / "images" / split / record["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (record["width"], record["height"])
            assert max(image.size) == 256


def test_aspect_ratios_vary(folder):
    sizes = {(image["width"], image["height"]) for image in load_coco(folder, "training").dataset["images"]}
    assert sizes == {(256, 192), (256, 171), (256, 256), (192, 256)}


@pytest.mark.parametrize("split", SPLITS)
def test_instance_masks_are_the_visible_pixels(folder, split):
    """Together the instances give exactly the class mask, none overlap, and boxes and areas are theirs."""
    coco = load_coco(folder, split)
    assert [coco.cats[i]["name"] for i in sorted(coco.cats)] == list(photoshapes.SHAPES)
    for image in coco.dataset["images"]:
        painted = np.ones((image["height"], image["width"]), np.uint8)
        for annotation in coco.imgToAnns[image["id"]]:
            assert isinstance(annotation["segmentation"]["counts"], str)
            mask = coco.annToMask(annotation).astype(bool)
            assert (painted[mask] == 1).all()
            painted[mask] = annotation["category_id"] + 1
            y, x = mask.nonzero()
            box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert annotation["bbox"] == box
            assert annotation["area"] == len(x) >= 150 / 4  # at half of the size for which the limit is given
            assert annotation["iscrowd"] == 0
        with Image.open(folder / "annotations" / split / image["file_name"].replace("jpg", "png")) as classes:
            np.testing.assert_array_equal(np.asarray(classes), painted)


def test_scenes_hold_one_to_six_objects_and_some_hide_parts_of_others(folder):
    coco = load_coco(folder, "training")
    assert {len(coco.imgToAnns[image]) for image in coco.imgs} == {1, 2, 3, 4, 5, 6}
    touching = 0
    for annotations in coco.imgToAnns.values():
        masks = np.array([coco.annToMask(a) for a in annotations], bool)
        just_below_an_object = masks.any(0)[:-1] & ~masks[:, :-1] & masks[:, 1:]
        touching += just_below_an_object.any()
    assert touching > len(coco.imgs) / 4


def test_objects_have_the_colour_that_is_named(folder):
    """In an object of a named colour, the hue of the mean colour is nearest to that name's."""
    coco = load_coco(folder, "training")
    pure = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "cyan": (0, 1, 1), "blue": (0, 0, 1)}
    pure["purple"] = (0.8, 0, 1)
    right = []
    for annotation in coco.dataset["annotations"]:
        with Image.open(folder / "images" / "training" / coco.imgs[annotation["image_id"]]["file_name"]) as image:
            mean = np.asarray(image)[coco.annToMask(annotation).astype(bool)].mean(axis=0)
        if annotation["colour"] is None:
            right.append(np.ptp(mean) < 25)
        else:
            cosine = {name: np.dot(mean, rgb) / np.linalg.norm(rgb) for name, rgb in pure.items()}
            right.append(max(cosine, key=cosine.get) == annotation["colour"])
    assert np.mean(right) > 0.98


def test_scenes_have_smooth_and_busy_areas():
    """At a moderate threshold there are patches to merge and patches to keep, and images differ in how many."""
    smooth = []
    for seed in range(30):
        image, _, _ = photoshapes.compose(np.random.default_rng(seed), "training", 512)
        scores = score_patches(torch.tensor(image).permute(2, 0, 1)[None].float(), (32,))[32]
        smooth.append((scores < 4.5).float().mean().item())
    assert 0.25 < np.mean(smooth) < 0.6
    assert np.std(smooth) > 0.1


def test_objects_are_as_large_as_asked():
    """Of an object that is not covered, the box is at least as long as the smallest diameter, less its stretching."""
    for min_diameter in (photoshapes.MIN_DIAMETER, 0.25):
        longest = []
        for seed in range(40):
            _, owner, objects = photoshapes.compose(np.random.default_rng(seed), "training", 256, min_diameter)
            if len(objects) == 1:
                rows, columns = np.nonzero(owner)
                longest.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        assert longest and min(longest) >= 0.6 * min_diameter * 256
        assert max(longest) > 0.25 * 256
    with pytest.raises(ValueError, match=r"min_diameter is 0\.5; it must be above 0 and at most 0.3"):
        photoshapes.make_photoshapes("nowhere", min_diameter=0.5)


# ------------------------------------------------------------------------------------------- questions


def load_questions(folder, split):
    return json.loads((folder / f"vqa_{split}.json").read_text())


def named(name, objects):
    """The only object that goes by a name such as "star" or "red star"."""
    *colour, shape = name.split()
    (only,) = [o for o in objects if o[0] == shape and colour in ([], [o[1]])]
    return only


def answer(question, objects):
    """Answer by reading the question; objects are (shape, colour, x, y) with centres relative to the image."""
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        names = {"objects": "", "crosses": "cross"}
        wanted = names.get(match[1], match[1].removesuffix("s"))
        return str(sum(o[0].startswith(wanted) for o in objects))
    if match := re.fullmatch(r"Is there a (?:(\w+) )?(\w+)\?", question):
        return "yes" if any(o[0] == match[2] and match[1] in (None, o[1]) for o in objects) else "no"
    if match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (only,) = [o for o in objects if o[1] == match[1]]
        return only[0]
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        return named(match[1], objects)[1]
    name = r"((?:\w+ )??\w+)"
    match = re.fullmatch(rf"Is the {name} (?:in the )?(\w+) or (\w+) (?:half|(?:of )?the {name})\?", question)
    axis = 2 if match[2] in ("left", "right") else 3
    thing, margin = named(match[1], objects), 0.1
    reference = 0.5
    if match[4]:
        reference, margin = named(match[4], objects)[axis], 0.15
    assert abs(thing[axis] - reference) > margin
    return match[2] if thing[axis] < reference else match[3]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_the_annotations(folder, split):
    coco = load_coco(folder, split)
    names = {category: record["name"] for category, record in coco.cats.items()}
    for record in load_questions(folder, split):
        image = coco.imgs[int(Path(record["image"]).stem)]
        objects = []
        for annotation in coco.imgToAnns[image["id"]]:
            y, x = coco.annToMask(annotation).nonzero()
            centre = (x.min() + x.max() + 1) / 2 / image["width"], (y.min() + y.max() + 1) / 2 / image["height"]
            objects.append((names[annotation["category_id"]], annotation["colour"], *centre))
        human, gpt = record["conversations"]
        assert gpt["value"] == answer(human["value"].removeprefix("<image>\n"), objects), record


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_llava_records(folder, split):
    records = load_questions(folder, split)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert (folder / record["image"]).is_file()
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        assert re.fullmatch(r"[a-z]+|[0-5]", gpt["value"])
    assert {record["image"] for record in records} == {
        f"images/{split}/{path.name}" for path in (folder / "images" / split).iterdir()
    }
    assert {record["question_type"] for record in records} == {"yes/no", "count", "shape", "colour", "position"}


def test_no_answer_pays_without_looking(folder):
    """Of two possible answers each is right half of the time; elsewhere the commonest is right in under a third."""
    shapes, colours = "|".join(photoshapes.SHAPES), "|".join(photoshapes.HUES)
    answers = {}
    for record in load_questions(folder, "training"):
        human, gpt = record["conversations"]
        form = re.sub(f"({shapes})(e?s)?", "SHAPE", re.sub(colours, "COLOUR", human["value"]))
        form = form.replace("the COLOUR SHAPE", "the SHAPE")
        answers.setdefault(form, Counter())[gpt["value"]] += 1
    assert len(answers) == len(photoshapes.QUESTION_TYPES)
    for form, counts in answers.items():
        if set(counts) <= {"yes", "no", "left", "right", "top", "bottom", "above", "below"}:
            assert len(set(counts.values())) == 1, (form, counts)
        else:
            assert max(counts.values()) < counts.total() / 3, (form, counts)


# ------------------------------------------------------------------------------------------- splits and seeds


def test_splits_share_no_pixel_of_a_photograph(monkeypatch):
    for width in (511, 512):
        first, second = (photoshapes.source_columns(width, split) for split in SPLITS)
        assert first[0] == 0 and first[1] == second[0] and second[1] == width

    used, photo_half = set(), photoshapes.photo_half
    monkeypatch.setattr(photoshapes, "photo_half", lambda name, split: used.add(split) or photo_half(name, split))
    for split in SPLITS:
        used.clear()
        for seed in range(5):
            photoshapes.compose(np.random.default_rng(seed), split, 128)
        assert used == {split}


def test_same_seed_same_bytes_whatever_the_number_of_workers(tmp_path):
    for name, seed, workers in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        photoshapes.make_photoshapes(tmp_path / name, train=4, val=2, size=128, seed=seed, workers=workers)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    first, other = files(tmp_path / "a"), files(tmp_path / "c")
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))


def test_more_images_leave_the_first_ones_as_they_are(folder, tmp_path):
    photoshapes.make_photoshapes(tmp_path / "few", train=2, val=1, size=256, seed=3)
    few, many = files(tmp_path / "few"), files(folder)
    assert all(few[name] == many[name] for name in few if name.endswith((".jpg", ".png")))


# ------------------------------------------------------------------------------------------- the command


def test_command_makes_and_summarises(tmp_path):
    done = command("new/set", "--train", "3", "--val", "2", "--size", "128", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"images\W+3\W+2\b", done.stdout)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["set"]


def test_existing_data_is_never_touched(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    done = command("set", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: set already exists; remove it or name another folder\n"
    assert files(tmp_path) == {"set/mine.txt": b"keep"}


def test_an_empty_folder_is_filled(tmp_path):
    photoshapes.make_photoshapes(tmp_path / "set", train=1, val=1, size=64)
    (tmp_path / "empty").mkdir()
    photoshapes.make_photoshapes(tmp_path / "empty", train=1, val=1, size=64)
    assert files(tmp_path / "empty") == files(tmp_path / "set")


def heed_interrupts():
    """Whatever started the tests in the background may have told them to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, stop):
    arguments = ["set", "--train", "3000", "--workers", "2"]
    options = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    with subprocess.Popen([sys.executable, SCRIPT, *arguments], **options) as run:
        wait_for(run, lambda: list(tmp_path.rglob("*.jpg")))
        run.send_signal(stop)
        message = run.stderr.read()
    assert run.returncode == 1
    assert message.endswith("interrupted; nothing is left in set\n")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_processes_and_the_next_one_removes_its_files(tmp_path):
    arguments = ["set", "--train", "3000", "--workers", "2"]
    with subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL) as run:
        wait_for(run, lambda: list(tmp_path.rglob("*.jpg")))
        tasks = Path(f"/proc/{run.pid}/task").glob("*/children")
        children = [child for task in tasks for child in task.read_text().split()]
        run.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    assert list(tmp_path.iterdir())
    photoshapes.make_photoshapes(tmp_path / "set", train=1, val=1, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_runs_for_folders_of_similar_names_leave_each_other_alone(tmp_path):
    with new_folder(tmp_path / "shapes-99999999") as folder, new_folder(tmp_path / "shapes") as other:
        (folder / "mine.txt").touch()
        (other / "mine.txt").touch()
    assert set(files(tmp_path)) == {"shapes-99999999/mine.txt", "shapes/mine.txt"}


def test_a_failing_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(folder, split, index, **_):
        (folder / "images" / split / f"{index:06d}.jpg").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(photoshapes, "write_scene", full_disk)
    with pytest.raises(OSError, match="No space left"):
        photoshapes.make_photoshapes(tmp_path / "set", train=1, val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"train": 0}, {"val": 0}, {"size": 63}, {"seed": -1}, {"workers": 0}])
def test_numbers_that_are_too_small_are_named(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} is {arguments[name]}; it must be at least"):
        photoshapes.make_photoshapes(tmp_path / "set", **arguments)


def test_missing_photographs_name_the_command_that_brings_them(tmp_path, monkeypatch):
    photoshapes.photo_half.cache_clear()
    monkeypatch.setattr(photoshapes, "PHOTOS", ("no_such_photo.png",))
    with pytest.raises(FileNotFoundError, match=r"no_such_photo\.png is missing: pip install"):
        photoshapes.make_photoshapes(tmp_path / "set")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        photoshapes.make_photoshapes(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
