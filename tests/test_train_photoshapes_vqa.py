"""The small LLaVA's training: what image tokens are told they show, and a checkpoint that stock transformers reads."""

import logging
import sys

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples import make_photoshapes
from examples import train_photoshapes_vqa as training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photoshapes"
    made = make_photoshapes.make_photoshapes(folder, train=12, val=4, size=128, min_diameter=0.2)
    return folder, made["training"][0]


@pytest.fixture(scope="module")
def scenes(data):
    _, processor = training.build(["objects left right top bottom circle red ?"])
    return training.Scenes(data[0], "training", processor)


def test_cells_tell_shape_colour_and_centre_of_their_object(data, scenes):
    coco = data[1]
    images = {image["id"]: image for image in coco["images"]}
    for index, cells in enumerate(scenes.cells):
        shape, colour, is_centre, x, y = cells
        own = [a for a in coco["annotations"] if a["image_id"] == index + 1]
        assert set(shape.unique().tolist()) - {0} <= {a["category_id"] for a in own}
        assert colour[shape == 0].eq(0).all() and is_centre[shape == 0].eq(0).all()
        assert 1 <= is_centre.sum() <= len(own)
        if len(own) == 1:
            (left, top, width, height), image = own[0]["bbox"], images[index + 1]
            longest = max(image["width"], image["height"])
            across = (left + width / 2 + (longest - image["width"]) / 2) * 2 / longest - 1
            down = (top + height / 2 + (longest - image["height"]) / 2) * 2 / longest - 1
            assert x[shape > 0].mean() == pytest.approx(across, abs=0.15)
            assert y[shape > 0].mean() == pytest.approx(down, abs=0.15)


def test_turning_an_image_turns_what_its_cells_say():
    """A white cell on black whose centre is its own place stays white and keeps saying its own place."""
    side, middle = training.CELLS, (torch.arange(training.CELLS) + 0.5) * 2 / training.CELLS - 1
    pixels, cells = torch.zeros(1, 3, side, side), torch.zeros(1, 5, side, side)
    pixels[..., 2, 7] = 1
    cells[0, :, 2, 7] = torch.tensor([1, 1, 1, middle[7], middle[2]])
    places = set()
    for _ in range(60):
        turned_pixels, turned_cells = training.turned(pixels, cells)
        row, column = (int(index) for index in (turned_pixels[0, 0] > 0).nonzero()[0])
        assert turned_cells[0, :3, row, column].tolist() == [1, 1, 1]
        torch.testing.assert_close(turned_cells[0, 3:, row, column], torch.stack([middle[column], middle[row]]))
        places.add((row, column))
    assert len(places) == 8


def test_an_interrupted_run_goes_on_after_the_alignment(data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    arguments = [str(data[0]), str(tmp_path / "llava"), "--alignment-steps", "25", "--steps", "2", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["train_photoshapes_vqa.py", *arguments])
    optimize = training.optimize

    def interrupted(name, *others):
        if name == "answers":
            raise KeyboardInterrupt
        optimize(name, *others)

    monkeypatch.setattr(training, "optimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main()
    assert not (tmp_path / "llava").exists()

    monkeypatch.setattr(training, "optimize", optimize)
    caplog.clear()
    training.main()
    assert "alignment: taken from" in caplog.text and "alignment: step" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    inputs = processor(
        images=torch.zeros(3, 100, 60), text="USER: <image> Is there a circle? ASSISTANT:", return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == training.CELLS**2
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_a_batch_of_more_images_than_there_are_is_refused(data, tmp_path, monkeypatch):
    arguments = [str(data[0]), str(tmp_path / "llava"), "--batch-size", "1000"]
    monkeypatch.setattr(sys, "argv", ["train_photoshapes_vqa.py", *arguments])
    with pytest.raises(ValueError, match="images; give a --batch-size of at most as many"):
        training.main()
