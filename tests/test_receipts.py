"""examples/make_receipts.py: the data set that it writes, and what it refuses."""

import shutil

import numpy as np
import pytest
from PIL import Image

from examples import make_receipts
from tests.receipts import save_receipts


def test_receipts_are_split_by_their_names_and_taken_once(tmp_path):
    source = save_receipts(tmp_path / "source")
    for kind in ("img/4.jpg", "box/4.csv"):
        shutil.copy(source / kind, (source / kind.replace("4", "5")))
    made = make_receipts.make_receipts(source, tmp_path / "receipts")
    assert made == {"training": 3, "validation": 1, "test": 1}
    for split, names in (("training", "012"), ("validation", "3"), ("test", "4")):
        for kind in ("images", "annotations"):
            assert sorted(path.stem for path in (tmp_path / "receipts" / kind / split).iterdir()) == list(names)


@pytest.mark.parametrize("longest, scale", [(160, 1), (80, 0.5)])
def test_lines_of_text_are_marked_whatever_the_size(longest, scale, tmp_path, monkeypatch):
    monkeypatch.setattr(make_receipts, "LONGEST", longest)
    make_receipts.make_receipts(save_receipts(tmp_path / "source"), tmp_path / "receipts")
    image = Image.open(tmp_path / "receipts/images/test/4.jpg")
    text = np.asarray(Image.open(tmp_path / "receipts/annotations/test/4.png"))
    assert image.size == text.shape[::-1] == (80 * scale, 160 * scale)
    expected = np.zeros((160, 80), bool)
    for top in (20, 40, 60, 80):
        expected[top : top + 11, 10:61] = True
    if scale == 1:
        np.testing.assert_array_equal(text, expected)
        dark = np.asarray(image.convert("L")) < 128
        np.testing.assert_array_equal(dark, expected)
    else:
        assert (text != expected[::2, ::2]).mean() < 0.1 and set(text.flat) == {0, 1}


def test_nothing_is_left_of_a_source_that_does_not_fit(tmp_path):
    source = save_receipts(tmp_path / "source")
    (source / "box/4.csv").write_text("10,20,60,20,TOTAL\n")
    with pytest.raises(ValueError, match=r"4\.csv has a line that is not x1,y1,x2,y2,x3,y3,x4,y4,text"):
        make_receipts.make_receipts(source, tmp_path / "receipts")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(FileNotFoundError, match="name the folder data"):
        make_receipts.make_receipts(tmp_path, tmp_path / "receipts")
