"""The measurement of box AP at equal tokens: its parts on small data."""

import json
import random

import mmdet  # noqa: F401, without it these tests are left out
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO

from benchmarks import equal_tokens_boxes as boxes
from benchmarks import study
from benchmarks.study import Setting


@pytest.fixture
def data(tmp_path):
    """Ten wide photographs with an object each, and one of the other class in the last."""
    (tmp_path / "photos").mkdir()
    images, objects = [], []
    for number in range(10):
        Image.new("RGB", (64, 48), (number, 90, 9)).save(tmp_path / f"photos/{number:012}.jpg")
        images.append({"id": number, "file_name": f"{number:012}.jpg", "width": 64, "height": 48})
        objects.append({"image_id": number, "category_id": 3, "bbox": [8, 4, 40, 36], "area": 40 * 36, "iscrowd": 0})
    objects.append({"image_id": 9, "category_id": 7, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0})
    objects.append({"image_id": 9, "category_id": 7, "bbox": [0, 0, 64, 48], "area": 64 * 48, "iscrowd": 1})
    objects = [{**annotation, "id": index + 1} for index, annotation in enumerate(objects)]
    categories = [{"id": 3, "name": "person"}, {"id": 7, "name": "cup"}]
    content = {"images": images, "annotations": objects, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return COCO(str(tmp_path / "boxes.json")), tmp_path / "photos"


def test_photographs_are_split_by_their_ids_and_crowds_left_out(data):
    coco, folder = data
    photos = boxes.read_photos(folder, coco)
    assert [[photo.id for photo in photos[split]] for split in photos] == [list(range(7)), [7], [8, 9]]
    last = photos["test"][-1]
    assert last.classes.tolist() == [0, 1] and last.boxes[0].tolist() == [8, 4, 48, 40]
    with pytest.raises(FileNotFoundError, match="none of the images"):
        boxes.read_photos(folder / "other", coco)


def test_upright_images_are_turned_and_squares_have_as_many_tokens():
    shapes = [boxes.shape_of(Image.new("RGB", size), (336, 448)) for size in ((64, 48), (48, 64), (50, 50))]
    assert shapes == [(336, 448), (448, 336), (392, 392)]


def test_boxes_follow_the_image(data):
    coco, folder = data
    photo = boxes.read_photos(folder, coco)["train"][0]
    assert boxes.sample_of(photo, (96, 128)).gt_instances.bboxes.tolist() == [[16, 8, 96, 80]]


def test_boxes_follow_a_view(tmp_path):
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[10:40, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "white.png")
    objects = torch.tensor([[30.0, 10, 70, 40], [0, 0, 1, 1]])
    photo = boxes.Photo(0, tmp_path / "white.png", 80, 60, objects, torch.tensor([5, 6]))
    chance, seen = random.Random(0), 0
    for _ in range(40):
        image, found = boxes.view_of(photo, (84, 112), chance)
        assert image.shape == (3, 84, 112) and 6 not in found.gt_instances.labels, "a pixel is too little"
        for left, top, right, bottom in found.gt_instances.bboxes.tolist():
            rows, columns = (torch.where((image[0] > 127).any(axis))[0].tolist() for axis in (1, 0))
            assert [left, top, right, bottom] == pytest.approx(
                [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], abs=1.5
            )
            seen += 1
    assert seen > 20


def test_what_is_found_exactly_has_full_ap_and_draws_vary(data):
    coco, _ = data
    exact = [[number, 8, 4, 40, 36, 0.9, 0] for number in range(10)] + [[9, 0, 0, 10, 10, 0.9, 1]]
    found = boxes.average_precisions(coco, range(10), exact, draws=3)
    assert found["mAP"] == pytest.approx(100) and found["person"] == pytest.approx(100)
    assert np.mean([draw[:3] for draw in found["draws"]]) == pytest.approx(100), (
        "the last, small objects, may have none"
    )
    confused = [[*line[:6], 1 - line[6]] for line in exact]
    assert boxes.average_precisions(coco, range(10), confused, draws=1)["any class"] == pytest.approx(100)
    half = boxes.average_precisions(coco, range(10), exact[::2], draws=20)
    assert half["mAP"] == pytest.approx(75, abs=1) and np.std(half["draws"], axis=0)[0] > 1


def test_a_box_of_several_classes_is_one_object(data):
    coco, _ = data
    exact = [[number, 8, 4, 40, 36, 0.9, 0] for number in range(10)] + [[9, 0, 0, 10, 10, 0.9, 1]]
    unsure = [line for each in exact for line in (each, [*each[:5], 0.4, 1 - each[6]])]
    assert boxes.average_precisions(coco, range(10), unsure, draws=1)["any class"] == pytest.approx(100)


def test_a_detector_learns_from_views_and_resumes(data, tmp_path, monkeypatch):
    coco, folder = data
    monkeypatch.setattr(boxes, "EPOCHS", 2)
    monkeypatch.setattr(boxes, "BATCH", 2)
    torch.manual_seed(0)
    detector = boxes.Detector(8, 2)
    start = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    photos = boxes.read_photos(folder, coco)["train"]

    def maps_of(images):
        cells = torch.nn.functional.avg_pool2d(images.float(), 14)
        return torch.cat([cells, cells.square(), cells[:, :2]], 1)

    boxes.train_detector(detector, photos, maps_of, 0, tmp_path / "state.pth")
    trained = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    detector.load_state_dict(start)
    boxes.train_detector(detector, photos, maps_of, 0, tmp_path / "state.pth")  # finished: its weights come back
    assert all(torch.equal(tensor, trained[name]) for name, tensor in detector.state_dict().items())
    boxes.train_classes(detector.classes, photos, maps_of, 0)
    sample = boxes.sample_of(photos[0], (84, 112))
    maps = maps_of(boxes.pixels_of(Image.open(photos[0].path), (84, 112)))
    probabilities = detector.eval().probabilities(maps)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 6, 8))
    (gradient,) = torch.autograd.grad(detector.probabilities(maps.requires_grad_())[:, 0].sum(), maps)
    assert gradient.any(), "learned maps are trained through them"
    found = detector.predict(maps, sample)
    assert found.shape[1] == 6 and len(found) % 2 == 0, "both classes of every box"
    assert (found[:, 4] >= 0).all() and (found[:, 2] <= photos[0].width + 1e-3).all()


def test_features_inside_boxes_of_maps_in_any_memory_format():
    maps = torch.zeros(2, 3, 6, 8)
    maps[1, 2, 1:4, 2:6] = 5
    inside, outside = torch.tensor([[28.0, 14, 84, 56]]), torch.tensor([[0.0, 0, 14, 84]])
    for memory in (torch.contiguous_format, torch.channels_last):
        found = boxes.mean_inside(maps.contiguous(memory_format=memory), [outside, torch.cat([inside, outside])])
        assert found.shape == (3, 3) and found[1].tolist() == pytest.approx([0, 0, 5], abs=1)
        assert (found[[0, 2]] == 0).all()


def test_gains_are_over_the_dense_curve():
    def of(value):
        return {"AP": [{**dict.fromkeys(boxes.KINDS, value), "draws": [[value] * 4, [value + 1] * 4]}]}

    measured = {
        Setting("dense", (28, 28)): {"tokens": 100, **of(10.0)},
        Setting("dense", (56, 56)): {"tokens": 200, **of(20.0)},
        Setting("apt", (56, 56), "learned", 150): {"tokens": 150, **of(17.0)},
        Setting("apt", (56, 56), "learned", 300): {"tokens": 300, **of(21.0)},
    }
    inside, beyond = boxes.gains(measured)
    assert (
        inside["mAP"] == [17.0, 2.0]
        and inside["errors"] == dict.fromkeys(boxes.WITH_ERRORS, 0)
        and beyond["mAP"] == [21.0, None]
    )


def test_scorers_learn_from_whole_photographs_and_parts_of_them(data, tmp_path, monkeypatch):
    _, folder = data
    small = dict(embed_dim=24, num_heads=2, num_classes=0, img_size=56, dynamic_img_size=True)
    network = timm.create_model("vit_small_patch14_dinov2", **small).eval()
    monkeypatch.setattr(study, "pretrained", lambda weights: network)
    monkeypatch.setattr(boxes, "train_detector", lambda *arguments: None)
    monkeypatch.setattr(boxes, "train_classes", lambda *arguments: None)
    monkeypatch.setattr(boxes, "SCORED_AT", ((56, 84),))
    monkeypatch.setattr(boxes, "PARTS", boxes.PARTS._replace(size=(28, 56), copies=2))
    of_photos = boxes.BoxStudy(folder, tmp_path / "boxes.json", None, tmp_path / "steps", torch.float32)
    whole, parts = of_photos.views("train")
    assert (whole.pixels.shape, whole.losses[28].shape) == ((7, 3, 56, 84), (7, 2, 3))
    assert (parts.pixels.shape, parts.losses[28].shape) == ((14, 3, 28, 56), (14, 1, 2))
    assert len(of_photos.views("val")) == 1
