"""tools/equal_tokens.py: its lines are what tools/test.py says of the same settings."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from tests.scripts import ROOT, data_options, evaluator_options, run_script
from tools import compare, equal_tokens, mm_runs
from tools import test as test_tool

APT, DENSE = (f"seg_configs/eva02_tiny_{method}_photoshapes.py" for method in ("apt", "dense"))
WEIGHTS = "seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
OTHER_WEIGHTS = WEIGHTS.replace("seg_", "det_")
SCORER = "seg_configs/checkpoints/eva02_tiny_scorer_photoshapes.safetensors"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(mm_runs, "TIMED_IMAGES", 1)


def settings(options):
    return ["--cfg-options", *(f"{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def run(photoshapes, tmp_path_factory):
    """The arguments of a comparison of the small segmenter, and what it reports."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [APT, WEIGHTS, "--work-dir", str(folder), "--keep", "0.5", "--scorer", "laplacian", SCORER]
    arguments += ["random", *settings(data_options(photoshapes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(mm_runs, "TIMED_IMAGES", 1)
        patch.setattr(equal_tokens, "DRAWS", 20)
        return arguments, equal_tokens.main(arguments)


def metrics_by(config, photoshapes, folder, **options):
    arguments = [config, WEIGHTS, "--work-dir", str(folder), *settings(data_options(photoshapes) | options)]
    return test_tool.main(arguments)


def line_of(report, title):
    return next(line for line in report["rows"] if line["title"] == title)


def test_lines_are_of_every_size_and_budget(run):
    titles = [line["title"] for line in run[1]["rows"]]
    sizes = [f"dense, images of {percent}%" for percent in (70, 65)]
    methods = ("merging, laplacian", "merging, eva02_tiny_scorer_photoshapes", "random")
    assert titles == ["dense", *sizes, *(f"{method}, 50%" for method in methods)]


def test_without_merging_it_is_the_dense_configuration(run, photoshapes, tmp_path):
    dense, line = metrics_by(DENSE, photoshapes, tmp_path), line_of(run[1], "dense")
    assert line["metrics"]["mIoU"] == dense["mIoU"]
    assert line["metrics"]["mIoU within 3 px of borders"] == dense["border/mIoU"]
    assert line["content_kept"] == 1 and "gains" not in line


def test_smaller_images_have_all_their_sides_in_proportion(run, photoshapes, tmp_path):
    """Images of 160 pixels in crops of 80, 53 apart, become 112 in crops of 56, 37 apart."""
    sides = {"test_dataloader.dataset.pipeline.1.scale": "(112,112)"}
    sides |= {"model.test_cfg.crop_size": "(56,56)", "model.test_cfg.stride": "(37,37)"}
    smaller, line = metrics_by(DENSE, photoshapes, tmp_path, **sides), line_of(run[1], "dense, images of 70%")
    assert line["metrics"]["mIoU"] == smaller["mIoU"]
    assert line["content_kept"] == pytest.approx(0.7**2)


def test_larger_images_are_merged_too(photoshapes, tmp_path):
    """Images of 160 pixels in crops of 80, 53 apart, become 200 in crops of 100, 66 apart; the shares of tokens are of
    those of 160 pixels."""
    options = data_options(photoshapes) | {"test_dataloader.dataset.indices": "2"}
    arguments = [APT, WEIGHTS, "--work-dir", str(tmp_path), "--keep", "0.6", "--scales", "1.25", *settings(options)]
    report = equal_tokens.main(arguments)
    titles = "dense, images of 125%", "merging, laplacian, images of 125%, 60%"
    dense, merged = (line_of(report, title) for title in titles)
    calibrated = json.loads((tmp_path / "steps/thresholds_of_laplacian__images_of_125_.json").read_text())
    larger = {"test_dataloader.dataset.pipeline.1.scale": "(200,200)"}
    larger |= {"model.test_cfg.crop_size": "(100,100)", "model.test_cfg.stride": "(66,66)"}
    assert dense["metrics"]["mIoU"] == metrics_by(DENSE, photoshapes, tmp_path / "dense", **options | larger)["mIoU"]
    larger["model.backbone.thresholds.8"] = calibrated["result"]["0.6"]["8"]
    expected = metrics_by(APT, photoshapes, tmp_path / "merged", **options | larger)
    assert merged["metrics"]["mIoU"] == expected["mIoU"]
    assert dense["content_kept"] == pytest.approx(1.25**2)
    assert merged["content_kept"] == pytest.approx(1.25**2 * expected["content_kept"])
    assert 0.8 < merged["content_kept"] < 1.1, "about 60 % of 156 %"
    gain = merged["gains"]["mIoU"]["tokens"]
    smaller = [(line["content_kept"], line["metrics"]["mIoU"]) for line in report["rows"] if line["method"] == "dense"]
    assert gain == equal_tokens.over(smaller, merged["content_kept"], merged["metrics"]["mIoU"])
    assert all(line["scale"] == 1.25 for line in report["rows"] if line["scorer"]), "only these are merged"


@pytest.fixture
def with_weights(run, tmp_path, monkeypatch):
    """Reports of the same comparison with other weights for lines that a flag names; and these weights."""
    monkeypatch.setattr(equal_tokens, "DRAWS", 20)
    weights = load_file(WEIGHTS)
    weights["decode_head.conv_seg.bias"] += torch.tensor([1.0, -1.0])
    other, folder = str(tmp_path / "other.safetensors"), str(tmp_path / "run")
    save_file(weights, other)
    shutil.copytree(run[0][run[0].index("--work-dir") + 1], folder)
    return lambda flag: equal_tokens.main([*run[0], "--work-dir", folder, flag, other]), other


def test_smaller_images_may_have_weights_of_their_own(run, with_weights, photoshapes, tmp_path):
    compare, other = with_weights
    report = compare("--smaller")
    title, sides = "dense, images of 70%", {"test_dataloader.dataset.pipeline.1.scale": "(112,112)"}
    sides |= {"model.test_cfg.crop_size": "(56,56)", "model.test_cfg.stride": "(37,37)"}
    arguments = [DENSE, other, "--work-dir", str(tmp_path / "test")]
    tested = test_tool.main([*arguments, *settings(data_options(photoshapes) | sides)])
    assert line_of(report, title)["metrics"]["mIoU"] == tested["mIoU"] != line_of(run[1], title)["metrics"]["mIoU"]
    for title in ("dense", "merging, laplacian, 50%"):
        assert line_of(report, title)["metrics"] == line_of(run[1], title)["metrics"]
    merged = "merging, laplacian, 50%"
    assert line_of(report, merged)["gains"]["mIoU"]["tokens"] != line_of(run[1], merged)["gains"]["mIoU"]["tokens"]


def test_merging_may_have_weights_of_its_own(run, with_weights, photoshapes, tmp_path):
    compare, other = with_weights
    report, title = compare("--merged"), "merging, laplacian, 50%"
    calibrated = json.loads((tmp_path / "run/steps/thresholds_of_laplacian.json").read_text())
    threshold = {"model.backbone.thresholds.8": calibrated["result"]["0.5"]["8"]}
    arguments = [APT, other, "--work-dir", str(tmp_path / "test")]
    tested = test_tool.main([*arguments, *settings(data_options(photoshapes) | threshold)])
    assert line_of(report, title)["metrics"]["mIoU"] == tested["mIoU"] != line_of(run[1], title)["metrics"]["mIoU"]
    for title in ("dense", "dense, images of 70%"):
        assert line_of(report, title)["metrics"] == line_of(run[1], title)["metrics"]


def test_merging_is_the_configuration_at_the_thresholds_that_were_found(run, photoshapes, tmp_path):
    folder = run[0][run[0].index("--work-dir") + 1]
    scorer = "eva02_tiny_scorer_photoshapes"
    for title, file, config, options in (
        ("merging, laplacian, 50%", "laplacian", APT, {}),
        (f"merging, {scorer}, 50%", scorer, APT, {"model.backbone.scorer": SCORER}),
        ("random, 50%", "laplacian", APT.replace("apt", "random"), {}),
    ):
        with open(f"{folder}/steps/thresholds_of_{file}.json") as found:
            thresholds = json.load(found)["result"]["0.5"]
        options = options | {f"model.backbone.thresholds.{size}": value for size, value in thresholds.items()}
        merged, line = metrics_by(config, photoshapes, tmp_path, **options), line_of(run[1], title)
        assert line["content_kept"] == merged["content_kept"] == pytest.approx(0.5, abs=0.1)
        if "random" not in title:
            assert line["metrics"]["mIoU"] == merged["mIoU"]


@pytest.mark.parametrize(
    "config, patch, scale, sides, padding",
    [
        ("det_configs/eva02_l_apt_1536.py", 16, 0.75, (1152, 1152), 1152),
        ("det_configs/eva02_l_apt_1536_rect.py", 16, 0.95, (1459, 1459), 32),  # not to squares: it stays
        ("det_configs/dinov2_s_apt_1024.py", 14, 70 / 73, (982, 982), 71 * 14),  # whole patches
        ("seg_configs/eva02_l_apt_640.py", 16, 0.9, (2304, 576), None),
    ],
)
def test_squares_are_padded_in_proportion_and_to_whole_patches(config, patch, scale, sides, padding):
    cfg = Config.fromfile(config)
    before = cfg.to_dict()
    smaller = mm_runs.rescaled(cfg, scale, patch)
    assert [step.scale for step in smaller.test_dataloader.dataset.pipeline if "scale" in step] == [sides]
    assert smaller.model.data_preprocessor.get("pad_size_divisor") == padding
    assert cfg.to_dict() == before


def test_smaller_images_fill_whole_patches_and_reach_below_every_budget():
    """Of 392 x 294 pixels, 28 x 21 patches, those whose sides are multiples of 3 / 21 of these."""

    images = [{"inputs": torch.zeros(3, 294, 392)}]
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=images))
    trunk = SimpleNamespace(patch_size=14)
    comparison = SimpleNamespace(slides=False, side=294, trunk=trunk, whole=runner, merged=[1.0])
    scales = equal_tokens.Comparison.scales(comparison, [0.9, 0.7, 0.5, 0.85 * 0.5])
    assert scales == [1, 18 / 21, 15 / 21, 12 / 21]
    # An image of 30 rows with 68 % of its tokens has as many as one of 24, with 28 % somewhat more than one of 15.
    comparison.merged = [30 / 21]
    tokens = (30 / 21) ** 2
    scales = equal_tokens.Comparison.scales(comparison, [0.68 * tokens, 0.28 * tokens, 0.85 * 0.28 * tokens])
    assert scales == [1, 30 / 21, 24 / 21, 15 / 21]


def test_smaller_crops_are_whole_patches():
    """A crop of 512 pixels is not, of 14; those that stand for it with fewer tokens must not be padded more."""
    assert [equal_tokens.scale_of(number, 512, 14, True) * 512 for number in (30, 24)] == [420, 336]
    assert equal_tokens.scale_of(36, 512, 14, True) == 1, "the configuration's own crop"
    assert equal_tokens.scale_of(24, 518, 14, True) == 24 / 37 == equal_tokens.scale_of(24, 518, 14, False)


def test_gains_are_over_smaller_images_of_as_many_tokens_and_as_much_time():
    def line(method, value, kept, seconds):
        return {"method": method, "metrics": {"mIoU": value}, "content_kept": kept, "seconds": seconds}

    lines = [line("dense", 60.0, 1.0, 1.0), line("dense", 50.0, 0.5, 0.5), line("merging", 59.0, 0.6, 0.75)]
    lines += [line("merging", 60.5, 0.9, 2.0), line("merging", 40.0, 0.4, 0.6)]

    def gains(number, samples):
        return equal_tokens.gains_of(number, "mIoU", lines, samples)

    without = [[]] * len(lines)
    assert gains(2, without) == {"tokens": pytest.approx(59 - 52), "time": pytest.approx(59 - 55), "error": None}
    assert gains(3, without)["time"] == pytest.approx(0.5), "slower than the whole image: over the whole image"
    assert gains(4, without)["tokens"] is None, "fewer tokens than the smallest image"
    # Two samples: the merged image gains 7 and 9, whatever the curve does.
    curves = [[{"mIoU": value} for value in values] for values in ((60, 30), (50, 20), (59, 31), (0, 0), (0, 0))]
    assert gains(2, curves)["error"] == pytest.approx(2**0.5)
    incomplete = [[*of_line, {} if number == 1 else {"mIoU": 99.0}] for number, of_line in enumerate(curves)]
    assert gains(2, incomplete)["error"] == pytest.approx(2**0.5), "a sample in which one has no value does not count"
    assert gains(2, [of_line[1:] for of_line in incomplete])["error"] is None, "of one there is no deviation"
    without_the_last = [*curves[:4], [{}, {}]]
    assert gains(2, without_the_last)["error"] == pytest.approx(2**0.5), "another line's lack is no concern of it"


def test_samples_are_of_images_and_the_same_ones_for_every_setting(run, photoshapes, tmp_path):
    folder, samples = run[0][run[0].index("--work-dir") + 1], {}
    for name in ("dense", "merging__laplacian__50_"):
        with open(f"{folder}/steps/{name}.json") as found:
            samples[name] = json.load(found)["result"]["samples"]
    assert len(samples["dense"]) == 20 and len({s["mIoU"] for s in samples["dense"]}) > 3
    line = line_of(run[1], "merging, laplacian, 50%")
    assert 0 < line["gains"]["mIoU"]["error"] < 5
    # A sample of three images out of three: each of them once has the test's own metrics.
    chance = random.Random(0)
    once = next(n for n in range(20) if sorted(chance.choices(range(3), k=3)) == [0, 1, 2])
    for name, title in (("dense", "dense"), ("merging__laplacian__50_", "merging, laplacian, 50%")):
        assert samples[name][once]["mIoU"] == pytest.approx(line_of(run[1], title)["metrics"]["mIoU"])


def average_precision(truth, found):
    """A finished evaluation of objects and detections: (image, class, box), and with a score."""

    def entries(lines):
        for number, (image, label, box, *score) in enumerate(lines, 1):
            entry = {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            yield entry | ({"score": score[0]} if score else {"iscrowd": 0})

    coco = COCO()
    coco.dataset = {"images": [{"id": image} for image, *_ in truth], "categories": [{"id": 1}, {"id": 2}]}
    coco.dataset["annotations"] = list(entries(truth))
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(list(entries(found))), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_average_precision_of_a_sample_is_that_of_a_data_set_with_these_images():
    """Image 1 twice, and image 3, is a data set of three images of which two are the same."""
    small, large, shifted = [10, 10, 20, 20], [10, 10, 80, 80], [14, 10, 80, 80]
    truth = [(1, 1, small), (1, 2, large), (2, 1, large), (3, 1, large), (3, 2, small)]
    found = [(1, 1, small, 0.9), (1, 2, shifted, 0.4), (1, 1, large, 0.95), (2, 1, shifted, 0.5), (3, 1, large, 0.6)]
    resampled = mm_runs.ResampledPrecision(average_precision(truth, found), areas=2).metrics([0, 0, 2])

    def copies(lines):
        of_image = {1: [1, 2], 2: [], 3: [3]}
        return [(copy, *line[1:]) for line in lines for copy in of_image[line[0]]]

    expected = average_precision(copies(truth), copies(found)).stats
    assert 0 < resampled["coco/bbox_mAP"] < 1
    names = ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_s")
    assert [resampled[name] for name in names] == pytest.approx([expected[0], expected[1], expected[3]])


def test_a_run_that_is_started_again_repeats_nothing_and_its_results_compare(run, monkeypatch, capsys):
    arguments, report = run
    monkeypatch.setattr(equal_tokens.Comparison, "set_up", None)
    assert equal_tokens.main(arguments)["rows"] == report["rows"]
    said = capsys.readouterr().out
    assert "| merging, laplacian, 50% |" in said
    assert "random: mIoU over a smaller image" in said and "of as much time" in said
    folder = arguments[arguments.index("--work-dir") + 1]
    results = compare.read_table(equal_tokens.Path(folder, "equal_tokens.json"))
    assert [result.method for result in results] == [line["title"] for line in report["rows"]]
    assert results[0].relative_speed == 1
    assert Image.open(f"{folder}/equal_tokens.png").width > 500


def test_a_scorer_that_was_distilled_again_repeats_its_own_lines_only(run, tmp_path, monkeypatch):
    folder, repeated, set_up = tmp_path / "run", [], equal_tokens.Comparison.set_up
    shutil.copytree(run[0][run[0].index("--work-dir") + 1], folder)
    monkeypatch.setattr(equal_tokens, "scorer_key", lambda scorer: f"new {scorer}" if scorer == SCORER else scorer)
    monkeypatch.setattr(equal_tokens.Comparison, "set_up", lambda self, row: repeated.append(row) or set_up(self, row))
    report = equal_tokens.main([*run[0], "--work-dir", str(folder)])
    assert [(row.scorer, row.keep) for row in repeated] == [(SCORER, 0.5)]
    title = "merging, eva02_tiny_scorer_photoshapes, 50%"
    assert line_of(report, title)["metrics"] == line_of(run[1], title)["metrics"]


def test_other_data_in_the_same_place_are_tested_anew(run, photoshapes, tmp_path, monkeypatch):
    data, repeated, set_up = tmp_path / "data", [], equal_tokens.Comparison.set_up
    shutil.copytree(photoshapes, data)
    monkeypatch.setattr(equal_tokens, "DRAWS", 20)
    monkeypatch.setattr(equal_tokens.Comparison, "set_up", lambda self, row: repeated.append(row) or set_up(self, row))
    arguments = [APT, WEIGHTS, "--work-dir", str(tmp_path / "run"), "--keep", "0.5", *settings(data_options(data))]
    first, tested = equal_tokens.main(arguments), len(repeated)
    assert equal_tokens.main(arguments)["rows"] == first["rows"] and len(repeated) == tested
    for labels in (data / "annotations/validation").glob("*.png"):
        Image.open(labels).point(lambda value: 1).save(labels)  # all background
    assert line_of(equal_tokens.main(arguments), "dense")["metrics"] != line_of(first, "dense")["metrics"]


def test_a_detector_that_finds_nothing_has_a_precision_of_nothing(photoshapes, tmp_path):
    """Its images are resized to a number, as mmcv allows."""
    options = data_options(photoshapes) | evaluator_options(photoshapes) | {"test_evaluator.metric": "bbox"}
    options |= {"model.test_cfg.rcnn.score_thr": 0.97, "test_dataloader.dataset.pipeline.1.scale": 192}
    detector = "det_configs/eva02_tiny_{}_photoshapes"
    weights = f"{detector.format('dense').replace('configs/', 'configs/checkpoints/')}.safetensors"
    arguments = ["--work-dir", str(tmp_path), "--keep", "0.3", "--scorer", "random", *settings(options)]
    report = equal_tokens.main([f"{detector.format('apt')}.py", weights, *arguments])
    found = [line["metrics"]["box mAP"] for line in report["rows"]]
    assert found[0] > 0 and line_of(report, "random, 30%")["metrics"]["box mAP"] == 0
    assert line_of(report, "random, 30%")["gains"]["box mAP"]["error"] > 0, (
        "nothing in every sample, the dense model has"
    )


def test_detectors_and_classifiers(photoshapes, tmp_path):
    """Their images become smaller, too: of 192 x 144 pixels, padded to squares, 160 x 120; of 224, 160."""
    import timm

    detector = "det_configs/eva02_tiny_{}_photoshapes.py"
    options = settings(data_options(photoshapes) | evaluator_options(photoshapes))
    weights = "det_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
    arguments = [detector.format("apt"), weights, "--work-dir", str(tmp_path / "det"), "--keep", "0.76", *options]
    report = equal_tokens.main(arguments)
    smaller = ["test_dataloader.dataset.pipeline.1.scale=(160,160)", "model.data_preprocessor.pad_size_divisor=160"]
    expected = test_tool.main([detector.format("dense"), weights, "--work-dir", str(tmp_path), *options, *smaller])
    line = line_of(report, "dense, images of 83.3%")
    assert line["metrics"]["box mAP"] == 100 * expected["coco/bbox_mAP"]
    merged = line_of(report, "merging, laplacian, 76%")
    assert {"box mAP", "AP50", "AP small", "mask mAP"} == set(merged["gains"])
    assert all(gains["error"] > 0 for gains in merged["gains"].values())
    assert line["tokens"] == expected["tokens"] == 20**2
    assert line["content_kept"] == pytest.approx((20 / 24) ** 2)

    for index, name in enumerate(("cats", "dogs")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(2):
            Image.effect_noise((300, 260), 20 + 90 * index + number).convert("RGB").save(
                tmp_path / "val" / name / f"{number}.png"
            )
    vit = timm.create_model("vit_base_patch16_224", depth=1, num_classes=2)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    options = {"num_workers": 0, "persistent_workers": False, "dataset.data_root": tmp_path / "val"}
    options = {f"test_dataloader.{name}": value for name, value in options.items()}
    options |= {"model.model_options.depth": 1, "model.num_classes": 2}
    classifier = ["cls_configs/vit_b_16_224_apt.py", str(tmp_path / "vit.safetensors")]
    report = equal_tokens.main([*classifier, "--work-dir", str(tmp_path / "cls"), "--keep", "0.5", *settings(options)])
    line = line_of(report, "dense, images of 71.4%")
    assert line["tokens"] == 10**2 and 0 <= line["metrics"]["top-1 accuracy"] <= 100
    assert line_of(report, "merging, entropy, 50%")["content_kept"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([APT, "none.pth"], "no checkpoint at none.pth"),
        ([APT, WEIGHTS, "--smaller", "none.pth"], "no checkpoint at none.pth"),
        ([APT, WEIGHTS, "--merged", "none.pth"], "no checkpoint at none.pth"),
        ([DENSE, WEIGHTS], "has no thresholds: its model is dense; name an adaptive configuration"),
        (["seg_configs/eva02_l_apt_512_ms.py", WEIGHTS], "tests at several scales"),
        ([APT, OTHER_WEIGHTS], f"{OTHER_WEIGHTS} is of another model"),
        ([APT, WEIGHTS, "--merged", OTHER_WEIGHTS], f"{OTHER_WEIGHTS} is of another model"),
        ([APT, WEIGHTS, "--keep", "70"], "--keep takes shares between 0 and 1"),
        ([APT, WEIGHTS, "--scales", "1", "0"], "--scales takes positive numbers"),
        ([APT, WEIGHTS, "--scorer", "none.safetensors"], "none.safetensors"),
        ([APT, WEIGHTS, "--scorer", SCORER, "copy/eva02_tiny_scorer_photoshapes.safetensors"], "rename one"),
        (["det_configs/eva02_l_apt_1536.py", WEIGHTS], "no data at data/coco/; put COCO there"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, photoshapes, tmp_path, monkeypatch):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/eva02_tiny_scorer_photoshapes.safetensors").write_bytes((ROOT / SCORER).read_bytes())
    for name in ("det_configs", "seg_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    own = settings(data_options(photoshapes)) if "seg_configs" in arguments[0] else []
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "tools/equal_tokens.py", *arguments, *own)
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code
