"""examples/make_nuclei.py: the data set that it writes, and what it refuses."""

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from examples.make_nuclei import make_nuclei
from tests.nuclei import SIDE, save_nuclei


def test_images_are_split_by_their_names(tmp_path):
    make_nuclei(save_nuclei(tmp_path / "source"), tmp_path / "nuclei")
    for split, names in (("training", "012"), ("validation", "3"), ("test", "4")):
        for kind in ("images", "annotations"):
            assert sorted(path.stem for path in (tmp_path / "nuclei" / kind / split).iterdir()) == list(names)


def test_boxes_and_masks_are_those_of_the_nuclei(tmp_path):
    make_nuclei(save_nuclei(tmp_path / "source"), tmp_path / "nuclei")
    truth = COCO(tmp_path / "nuclei/annotations/instances_test.json")
    (image,) = truth.loadImgs(truth.getImgIds())
    assert (image["file_name"], image["height"], image["width"]) == ("4.png", 24, 40)
    assert Image.open(tmp_path / "nuclei/images/test/4.png").getpixel((0, 4)) == (200, 200, 200)
    nuclei = truth.loadAnns(truth.getAnnIds())
    assert [nucleus["bbox"] for nucleus in nuclei] == [[SIDE * number, 4, SIDE, SIDE] for number in range(4)]
    assert {nucleus["area"] for nucleus in nuclei} == {SIDE * SIDE}
    inside = np.zeros((24, 40), np.uint8)
    inside[4 : 4 + SIDE, : 4 * SIDE] = 1
    np.testing.assert_array_equal(sum(map(truth.annToMask, nuclei)), inside)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "nuclei/annotations/test/4.png")), inside)


def test_nothing_is_left_of_a_source_that_does_not_fit(tmp_path):
    source = save_nuclei(tmp_path / "source")
    Image.new("L", (3, 3)).save(source / "4/masks/0.png")
    with pytest.raises(ValueError, match=r"4/masks/0\.png has another size than its image"):
        make_nuclei(source, tmp_path / "nuclei")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_with_files_or_without_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="name the folder stage1_train"):
        make_nuclei(tmp_path, tmp_path / "nuclei")
    save_nuclei(tmp_path / "source")
    (tmp_path / "nuclei").mkdir()
    (tmp_path / "nuclei/notes.txt").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        make_nuclei(tmp_path / "source", tmp_path / "nuclei")
    assert [path.name for path in (tmp_path / "nuclei").iterdir()] == ["notes.txt"]
