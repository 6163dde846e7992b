"""Detection end to end on a handful of PhotoShapes images: training, fine-tuning, testing, bad input."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import RUNNERS
from PIL import Image

import apt_backbones.mm.det  # noqa: F401
from apt_backbones import read_checkpoint
from apt_backbones.mm.data import BadData
from examples.make_nuclei import make_nuclei
from examples.make_persons import make_persons
from tests.bccd import save_bccd
from tests.nuclei import save_nuclei
from tests.persons import save_coco
from tests.scorers import give_scorer
from tests.scripts import ENVIRONMENT, ROOT, data_options, evaluator_options
from tools.mm_config import training_images

MMDET_TOOLS = Path(__import__("mmdet").__file__).parent / ".mim" / "tools"


def options(data, **settings):
    """Settings for a run of a few iterations on these images."""
    return {
        **data_options(data),
        **evaluator_options(data),
        "train_dataloader.batch_size": 2,
        "default_hooks.logger.interval": 1,
        "default_hooks.checkpoint.interval": 1,
        "train_cfg.max_iters": 2,
        "train_cfg.val_interval": 2,
        **settings,
    }


def runner(method, data, work_dir, **settings):
    cfg = Config.fromfile(f"det_configs/eva02_tiny_{method}_photoshapes.py")
    cfg.merge_from_dict(options(data, **settings))
    cfg.work_dir, cfg.log_level = str(work_dir), "WARNING"
    cfg.experiment_name = f"{method}_{time.time()}"
    return RUNNERS.build(cfg)


def command(script, *arguments, **settings):
    return [sys.executable, script, *map(str, arguments), "--cfg-options", *(f"{k}={v}" for k, v in settings.items())]


@pytest.fixture(scope="session")
def trained(photoshapes, tmp_path_factory):
    """A dense checkpoint after two iterations, and the metrics of the validation that ended the training."""
    work_dir = tmp_path_factory.mktemp("dense")
    run = runner("dense", photoshapes, work_dir)
    run.train()
    metrics = {k.removeprefix("val/"): v.current() for k, v in run.message_hub.log_scalars.items() if "val/" in k}
    return work_dir / "iter_2.pth", metrics


def test_a_test_reproduces_the_validation_of_the_training(trained, photoshapes, tmp_path):
    checkpoint, validated = trained
    tested = runner("dense", photoshapes, tmp_path, load_from=str(checkpoint)).test()
    assert {"coco/bbox_mAP", "coco/segm_mAP", "content_kept"} < set(tested)
    for name, value in tested.items():
        assert value == validated[name], name


def test_the_short_finetune_changes_only_the_new_layers(trained, photoshapes, tmp_path):
    checkpoint, _ = trained
    runner("apt", photoshapes, tmp_path, load_from=str(checkpoint)).train()
    before, after = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "iter_2.pth")
    new = {name for name in after if "conv_down" in name or "zero_mlp" in name}
    assert set(after) - set(before) == new and len(new) == 4
    for name, tensor in before.items():
        assert tensor.equal(after[name]), f"{name} moved"
    assert any(after[name].any() for name in new if "zero_mlp" in name), "ZeroMLP has not learnt"


def test_a_batch_in_which_nothing_merges_trains(trained, photoshapes, tmp_path):
    checkpoint, _ = trained
    nothing = {"model.backbone.thresholds.16": 0.0, "model.backbone.thresholds.32": 0.0}
    run = runner("apt", photoshapes, tmp_path, load_from=str(checkpoint), **nothing)
    run.train()
    assert run.message_hub.get_scalar("train/content_kept").current() == 1


def test_adaptive_baselines_run_from_the_dense_checkpoint(trained, photoshapes, tmp_path):
    checkpoint, dense = trained
    for method in ("resizing", "random", "apt"):
        metrics = runner(method, photoshapes, tmp_path / method, load_from=str(checkpoint)).test()
        assert metrics["content_kept"] < 1 == dense["content_kept"], method


def test_a_plain_vitdet_checkpoint_is_refused(photoshapes, tmp_path):
    vitdet = {
        "backbone.net.blocks.0.attn.qkv.weight": torch.zeros(6, 2),
        "backbone.net.pos_embed": torch.zeros(1, 5, 2),
    }
    torch.save({"model": vitdet}, tmp_path / "vitdet.pth")
    with pytest.raises(ValueError, match=r"another model.*missing.*unknown"):
        runner("dense", photoshapes, tmp_path, load_from=str(tmp_path / "vitdet.pth")).test()


def test_training_skips_a_truncated_image_and_a_test_names_it(trained, photoshapes, tmp_path):
    checkpoint, _ = trained
    data = tmp_path / "data"
    shutil.copytree(photoshapes, data)
    for split, index in (("training", "000003"), ("validation", "000002")):
        image = data / f"images/{split}/{index}.jpg"
        image.write_bytes(image.read_bytes()[:500])
    settings = {"train_cfg.val_interval": 9, "train_cfg.max_iters": 3, "val_cfg": None, "val_dataloader": None}
    run = runner("apt", data, tmp_path / "run", load_from=str(checkpoint), **settings, val_evaluator=None)
    run.train()
    (line,) = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert "images/training/000003.jpg" in line
    with pytest.raises(BadData, match=r"images/validation/000002\.jpg"):
        runner("apt", data, tmp_path / "test", load_from=str(checkpoint)).test()


def test_a_resumed_run_equals_one_that_was_not_interrupted(trained, photoshapes, tmp_path):
    """mmdet's region sampler and augmentation are random."""
    checkpoint, _ = trained
    settings = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 9, "randomness.seed": 3}
    settings |= {"val_cfg": None, "val_dataloader": None, "val_evaluator": None}
    for name, stop in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        work_dir, settings["train_cfg.max_iters"] = tmp_path / name, stop
        start = {"load_from": str(checkpoint)}
        if (work_dir / "iter_2.pth").is_file():
            start = {"load_from": str(work_dir / "iter_2.pth"), "resume": True}
        runner("apt", photoshapes, work_dir, **settings, **start, param_scheduler=[]).train()
    whole, resumed = (read_checkpoint(tmp_path / name / "iter_4.pth") for name in ("whole", "resumed"))
    assert whole["backbone.adaptive_embed.zero_mlp.weight"].any()
    for name, tensor in whole.items():
        assert tensor.equal(resumed[name]), name


@pytest.mark.parametrize("missing", ["annotations/instances_training.json", "images"])
def test_missing_data_is_named(missing, photoshapes, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("annotations", "images"):
        if missing != name:
            (data / name).symlink_to(photoshapes / name)
    if missing.endswith("json"):
        (data / "annotations").unlink()
    with pytest.raises((FileNotFoundError, BadData), match=missing.split("/")[0]):
        runner("dense", data, tmp_path / "work").train()


def test_images_without_objects_train(photoshapes, tmp_path):
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "images").symlink_to(photoshapes / "images")
    for split in ("training", "validation"):
        content = json.loads((photoshapes / f"annotations/instances_{split}.json").read_text())
        content["annotations"] = content["annotations"][:1] if split == "validation" else []
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    run = runner("dense", data, tmp_path / "work")
    run.train()
    assert run.iter == 2


@pytest.fixture(scope="session")
def detector(trained, photoshapes, tmp_path_factory):
    run = runner("apt", photoshapes, tmp_path_factory.mktemp("detector"), load_from=str(trained[0]))
    run.load_or_resume()
    run.model.cfg = run.cfg
    return run.model.eval()


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((40, 60), 90, np.uint8),
        np.full((40, 60, 4), 90, np.uint8),
        np.full((40, 60), 9000, np.uint16),
        np.full((300, 1, 3), 90, np.uint8),
        np.full((1, 1, 3), 90, np.uint8),
    ],
    ids=["grey", "RGBA", "16-bit", "1 px wide", "1 px"],
)
def test_unusual_images_are_detected_in(pixels, detector, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "image.png")
    result = inference_detector(detector, str(tmp_path / "image.png"))
    assert result.ori_shape == pixels.shape[:2]
    assert result.pred_instances.bboxes.isfinite().all()


@pytest.mark.slow
def test_configs_run_under_mmdets_own_scripts(trained, photoshapes, tmp_path):
    settings = options(photoshapes, load_from=trained[0])
    config = "det_configs/eva02_tiny_apt_photoshapes.py"
    train = command(MMDET_TOOLS / "train.py", config, "--work-dir", tmp_path, **settings)
    subprocess.run(train, check=True, cwd=ROOT, env=ENVIRONMENT)
    test = command(
        MMDET_TOOLS / "test.py", config, tmp_path / "iter_2.pth", "--work-dir", tmp_path / "test", **settings
    )
    output = subprocess.run(test, check=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert "content_kept" in output.stdout and "coco/bbox_mAP" in output.stdout


@pytest.mark.slow
def test_two_processes_train_on_a_cpu_even_if_nothing_merges(trained, photoshapes, tmp_path):
    nothing = {"model.backbone.thresholds.16": 0.0, "model.backbone.thresholds.32": 0.0}
    settings = options(photoshapes, load_from=trained[0], **nothing)
    config = "det_configs/eva02_tiny_apt_photoshapes.py"
    arguments = command("tools/train.py", config, "--work-dir", tmp_path, "--launcher", "pytorch", **settings)[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    subprocess.run([*launcher, *arguments], check=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert (tmp_path / "iter_2.pth").is_file()


def test_what_is_learned_without_labels_is_learned_from_the_training_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "det_configs/dinov2_s_resizing_bccd.py")
    with pytest.raises(FileNotFoundError, match="no data at data/bccd; put the folder BCCD of"):
        training_images(config)
    pictures = {name: (Image.new("RGB", (64, 48)), [("RBC", (1, 1, 30, 30))]) for name in ("a", "b")}
    save_bccd(tmp_path / "data/bccd", pictures)
    (tmp_path / "data/bccd/ImageSets/Main/train.txt").write_text("b\n")
    assert training_images(config) == [Path("data/bccd/JPEGImages/b.jpg")]


@pytest.fixture(scope="session")
def whole_images(tmp_path_factory) -> Path:
    """Folders bccd, nuclei and persons of a few images."""
    root, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    pictures = {str(n): Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8)) for n in range(2)}
    boxes = [("RBC", (10, 10, 60, 70)), ("WBC", (50, 20, 120, 90)), ("Platelets", (5, 70, 25, 90))]
    save_bccd(root / "bccd", {name: (picture, boxes) for name, picture in pictures.items()})
    make_nuclei(save_nuclei(root / "source"), root / "nuclei")
    make_persons(save_coco(root, range(1, 6), (128, 96)), root / "persons")
    return root


@pytest.mark.parametrize("data", ["bccd", "nuclei", "persons"])
@pytest.mark.parametrize("method", ["dense", "learned"])
def test_heads_are_trained_on_the_last_map_of_whole_images(method, data, whole_images, tmp_path):
    cfg = Config.fromfile(f"det_configs/dinov2_s_{method}_{data}.py")
    give_scorer(cfg, tmp_path)
    cfg.update(work_dir=str(tmp_path / "run"), log_level="WARNING", experiment_name=f"{data}_{method}")
    cfg.model.backbone.checkpoint = None
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(whole_images / data)
        for step in loader.dataset.pipeline:
            step.update({name: side for name, side in (("scale", (112, 84)), ("crop_size", (84, 112))) if name in step})
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if "ann_file" in evaluator:
            evaluator.ann_file = evaluator.ann_file.replace(cfg.data_root, str(whole_images / data))
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    runner = RUNNERS.build(cfg)
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    runner.train()
    metrics = runner.test()
    assert 0 <= metrics["coco/bbox_mAP"] <= 1 and metrics["tokens"] <= 6 * 8
    moved = {name.split(".")[0] for name, tensor in runner.model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"neck", "rpn_head", "roi_head"}
