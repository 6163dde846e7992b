"""examples/make_persons.py: the annotations that it writes, and what it refuses."""

import json

import pytest
from pycocotools.coco import COCO

from examples.make_persons import make_persons
from tests.persons import PERSON, save_coco


def test_photographs_of_people_are_split_by_their_ids(tmp_path):
    coco = save_coco(tmp_path / "coco", (5, 3, 0, 9, 7, 1))
    make_persons(coco, coco / "persons")
    for split, ids in (("training", [1, 3, 5]), ("validation", [7]), ("test", [9])):
        truth = COCO(coco / f"persons/{split}.json")
        assert sorted(truth.getImgIds()) == ids and truth.getCatIds() == [PERSON]
        assert sorted(person["image_id"] for person in truth.loadAnns(truth.getAnnIds())) == ids
        assert {tuple(person["bbox"]) for person in truth.loadAnns(truth.getAnnIds())} == {(8, 4, 40, 36)}


def test_what_is_missing_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json; name COCO's folder"):
        make_persons(tmp_path, tmp_path / "persons")
    coco = save_coco(tmp_path / "coco", range(6))
    (coco / "val2017/000000000004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no 000000000004\.jpg in "):
        make_persons(coco, coco / "persons")
    (coco / "annotations/instances_val2017.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": []})
    )
    with pytest.raises(ValueError, match="no annotations of the category person"):
        make_persons(coco, coco / "persons")
    assert sorted(path.name for path in coco.iterdir()) == ["annotations", "val2017"]
