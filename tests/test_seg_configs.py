"""seg_configs: every file describes the network it names, trains a step and tests an image, also by mmseg's tools."""

import json
from pathlib import Path

import mmseg
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS, init_default_scope
from mmseg.registry import MODELS
from PIL import Image

from apt_backbones.freeze import is_new
from tests.scorers import give_scorer
from tests.scripts import ROOT, run_script

CONFIGS = sorted((ROOT / "seg_configs").glob("*.py"))
ADE20K = [path for path in CONFIGS if path.stem.startswith("eva02") and "photoshapes" not in path.stem]
WHOLE = [path for path in CONFIGS if path.stem.endswith(("camvid", "nuclei", "receipts"))]
TIMM = [path for path in CONFIGS if path.stem.startswith("dino") and path not in WHOLE]
PHOTOSHAPES = [path for path in CONFIGS if "photoshapes" in path.stem]
MM_TOOLS = Path(mmseg.__file__).parent / ".mim" / "tools"
CROP = 64


def names(paths):
    return [path.stem for path in paths]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Four images and masks in ADE20K's layout, noisy on the left and smooth on the right; ids up to seven classes."""
    root, rng = tmp_path_factory.mktemp("seg_data"), np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(2):
            image = np.full((96, 130, 3), 128, np.uint8)
            image[:, :70] = rng.integers(0, 256, (96, 70, 3))
            mask = np.ones((96, 130), np.uint8)
            mask[20:60, 20 + 30 * index : 90] = 2 + 5 * index
            Image.fromarray(image).save(root / "images" / split / f"{index}.jpg")
            Image.fromarray(mask).save(root / "annotations" / split / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _plain_config_text(monkeypatch):
    """mmengine formats every config for its log, a second each time."""
    monkeypatch.setattr(Config, "pretty_text", property(lambda cfg: str(cfg.to_dict())))


def small(path: Path, data: Path, work_dir: Path) -> Config:
    """A config at a scale for tests: narrow, crops of 64 pixels, the images above, two iterations, on the CPU."""
    cfg = Config.fromfile(path)
    give_scorer(cfg, work_dir)
    cfg.work_dir = str(work_dir)
    cfg.load_from = None
    model = cfg.model.module if cfg.model.type == "SegTTAModel" else cfg.model
    model.data_preprocessor.size = (CROP, CROP)
    if model.backbone.type == "APTTimm":
        width = 384
        model.backbone.update(model=model.backbone.model.replace("base", "small").split(".")[0], checkpoint=None)
    else:
        width = 48
        model.backbone.update(img_size=CROP, pretrain_img_size=CROP, embed_dim=48, depth=4, num_heads=3)
    if model.neck is None:
        model.decode_head.update(in_channels=width, channels=width)
    else:
        model.backbone.out_indices = (0, 1, 2, 3)
        model.neck.embed_dim = width
        model.decode_head.update(in_channels=[width] * 4, channels=16)
        model.auxiliary_head.update(in_channels=width, channels=16)
    model.test_cfg.update(crop_size=(CROP, CROP), stride=(43, 43))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        shrink_pipeline(loader.dataset.pipeline)
    cfg.train_dataloader.batch_size = 2
    cfg.optim_wrapper.type = "OptimWrapper"
    cfg.optim_wrapper.pop("loss_scale", None)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    return cfg


def shrink_pipeline(pipeline) -> None:
    for step in pipeline:
        if isinstance(step, (list, tuple)):
            shrink_pipeline(step)
        elif step["type"] == "TestTimeAug":
            shrink_pipeline(step["transforms"])
        elif "scale" in step:
            step["scale"] = (CROP * 4, CROP)
        elif "crop_size" in step:
            step["crop_size"] = (CROP, CROP)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


# ------------------------------------------------------------------------------------------- what they describe


@pytest.mark.parametrize("path", ADE20K, ids=names(ADE20K))
def test_ade20k_models_are_the_published_ones(path, tmp_path):
    cfg = Config.fromfile(path)
    give_scorer(cfg, tmp_path)
    init_default_scope("mmseg")
    model_cfg = cfg.model.module if cfg.model.type == "SegTTAModel" else cfg.model
    with torch.device("meta"):
        model = MODELS.build(model_cfg)
    size, letter = path.stem.split("_")[3], path.stem.split("_")[1]
    crop = int(size)
    name = {"b": "eva02_base_patch14_448", "l": "eva02_large_patch14_448"}[letter]
    with torch.device("meta"):
        reference = timm.create_model(name, img_size=crop, patch_size=16, num_classes=0)
    shapes = {k: v.shape for k, v in model.backbone.state_dict().items() if not is_new(k)}
    expected = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith(("fc_norm", "norm", "head"))}
    assert shapes == expected
    assert tuple(model.test_cfg.crop_size) == (crop, crop) and model.num_classes == 150
    assert (model.decode_head.channels, model.auxiliary_head.channels) == {
        ("b", 512): (768, 256),
        ("l", 512): (1024, 256),
        ("l", 640): (1536, 1536),
    }[letter, crop]
    variant = path.stem.split("_")[2]
    assert model.backbone.thresholds == {"dense": {}, "learned": {32: 0.02}}.get(variant, {32: 5.75})
    assert model.backbone.merge == {"dense": "apt", "learned": "resizing"}.get(variant, variant)
    assert model.backbone.map_fill == ("interpolate" if variant == "learned" else "repeat")


@pytest.mark.parametrize("path", TIMM, ids=names(TIMM))
def test_timm_models_fit_their_heads(path, tmp_path):
    cfg = Config.fromfile(path)
    give_scorer(cfg, tmp_path)
    init_default_scope("mmseg")
    with torch.device("meta"):
        model = MODELS.build(cfg.model).eval()
        trunk, is_linear = model.backbone.trunk, "linear" in path.stem
        channels = model.decode_head.in_channels
        assert channels == (trunk.embed_dim if is_linear else [trunk.embed_dim] * 4)
    assert timm.get_pretrained_cfg(cfg.model.backbone.model, allow_unregistered=False) is not None
    assert model.backbone.norm == is_linear
    patch = trunk.patch_size
    is_learned = "_learned_" in path.stem
    assert trunk.thresholds == ({2 * patch: 5.75} if "_apt_" in path.stem else {2 * patch: 0.02} if is_learned else {})
    assert trunk.map_scale == (2 if is_learned else 1), "only linear heads have such configurations"
    if is_linear:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(is_new(name) if "_apt_" in path.stem else name.startswith("decode_head") for name in trained)


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_adaptive_configs_short_finetune_and_the_others_do_not(path):
    cfg = Config.fromfile(path)
    model = cfg.model.module if cfg.model.type == "SegTTAModel" else cfg.model
    is_apt = "_apt_" in path.stem
    assert model.type == ("ShortFinetuneEncoderDecoder" if is_apt else "APTEncoderDecoder")
    if is_apt:
        dense = Config.fromfile(path.with_name(path.name.replace("_apt_", "_dense_")))
        # 5 % of the iterations at a tenth of the learning rate, all else the same.
        assert cfg.train_cfg.max_iters * 20 == dense.train_cfg.max_iters
        assert cfg.optim_wrapper.optimizer.pop("lr") * 10 == pytest.approx(dense.optim_wrapper.optimizer.pop("lr"))
        assert cfg.optim_wrapper == dense.optim_wrapper
        assert cfg.train_dataloader == dense.train_dataloader
        assert [scheduler.type for scheduler in cfg.param_scheduler] == ["LinearLR", "PolyLR"]
        assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters


# ------------------------------------------------------------------------------------------- that they run


TIMM_RUN = ("dinov3_b_apt_512", "dinov2_b_linear_apt_512", "dinov2_b_linear_learned_512")
RUN = [*ADE20K, *PHOTOSHAPES, *(path for path in TIMM if path.stem in TIMM_RUN)]


@pytest.mark.parametrize("path", RUN, ids=names(RUN))
def test_trains_and_slides_at_a_small_scale(path, data, tmp_path):
    cfg = small(path, data, tmp_path)
    is_multi_scale = cfg.model.type == "SegTTAModel"
    runner = RUNNERS.build(cfg)
    if not is_multi_scale:
        runner.train()
    metrics = runner.test()
    assert 0 <= metrics["mIoU"] <= 100
    if "dense" in path.stem:
        assert metrics["content_kept"] == 1
    elif "learned" not in path.stem:  # a random scorer is used
        assert metrics["content_kept"] < 1
    model = runner.model.module if is_multi_scale else runner.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if "_apt_" in path.stem:
        assert trained and all(is_new(name) for name in trained)
    elif "linear" in path.stem:
        assert trained and all(name.startswith("decode_head") for name in trained)
    else:
        assert len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize("path", WHOLE, ids=names(WHOLE))
def test_a_head_is_trained_on_maps_of_whole_images(path, tmp_path):
    rng = np.random.default_rng(0)
    cfg = Config.fromfile(path)
    num_classes, num_labels = (11, 12) if path.stem.endswith("camvid") else (2, 2)  # CamVid's label 11 is ignored
    give_scorer(cfg, tmp_path)
    cfg.update(work_dir=str(tmp_path / "run"), load_from=None)
    cfg.model.backbone.checkpoint = None
    cfg.model.data_preprocessor.size = (56, 84)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(tmp_path)
        for name, shape, most, suffix in (
            ("img_path", (48, 64, 3), 256, loader.dataset.get("img_suffix", ".png")),
            ("seg_map_path", (48, 64), num_labels, ".png"),
        ):
            folder = tmp_path / loader.dataset.data_prefix[name]
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(rng.integers(0, most, shape, np.uint8)).save(folder / f"{index}{suffix}")
        for step in loader.dataset.pipeline:
            step.update(
                {
                    name: {"scale": (84, 63), "crop_size": (56, 84)}[name]
                    for name in ("scale", "crop_size")
                    if name in step
                }
            )
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    runner = RUNNERS.build(cfg)
    runner.train()
    metrics = runner.test()
    assert 0 <= metrics["mIoU"] <= 100
    trained = {name for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    classifier = runner.model.decode_head.conv_seg
    if "upernet" in path.stem:
        assert {name.split(".")[0] for name in trained} == {"neck", "decode_head"}
        assert len(classifier.weight) == num_classes
    else:
        assert trained == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
        assert classifier.weight.shape[:2] == (num_classes, 3 * 384)


# ------------------------------------------------------------------------------------------- tools


def options(data: Path, **settings) -> list[str]:
    settings |= {f"{split}_dataloader.dataset.data_root": data for split in ("train", "val", "test")}
    return ["--cfg-options", *(f"{name}={value}" for name, value in settings.items())]


def test_mmsegs_own_train_and_test_run_the_configs_unchanged(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ROOT / "seg_configs/eva02_tiny_apt_photoshapes.py"
    settings = {"load_from": None, "train_cfg.max_iters": 2, "train_cfg.val_interval": 2}
    settings |= {"default_hooks.checkpoint.interval": 2, "visualizer.name": "of_this_test"}
    common = options(data, **settings)
    run_script(monkeypatch, MM_TOOLS / "train.py", config, "--work-dir", tmp_path / "train", *common)
    checkpoint = tmp_path / "train/iter_2.pth"
    run_script(monkeypatch, MM_TOOLS / "test.py", config, checkpoint, "--work-dir", tmp_path / "test", *common)
    lines = next((tmp_path / "train").glob("*/vis_data/scalars.json")).read_text().splitlines()
    (validated,) = (json.loads(line) for line in lines if "mIoU" in line)
    (tested,) = (json.loads(path.read_text()) for path in (tmp_path / "test").glob("*/*.json"))
    for name in ("mIoU", "aAcc", "border/mIoU", "content_kept"):
        assert tested[name] == pytest.approx(validated[name]), name


def test_resume_starts_a_finetune_at_its_load_from_and_continues_one_that_has_begun(data, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"train_cfg.val_begin": 100, "default_hooks.checkpoint.interval": 1}

    def train(name, **more):
        config, work_dir = ROOT / f"seg_configs/eva02_tiny_{name}_photoshapes.py", tmp_path / name
        arguments = (config, "--resume", "--work-dir", work_dir, *options(data, **settings, **more))
        run_script(monkeypatch, ROOT / "tools/train.py", *arguments)

    train("dense", **{"train_cfg.max_iters": 1})
    dense = weights_of(tmp_path / "dense/iter_1.pth")
    for iterations in (1, 2):
        train("apt", **{"train_cfg.max_iters": iterations, "load_from": tmp_path / "dense/iter_1.pth"})
        apt = torch.load(tmp_path / f"apt/iter_{iterations}.pth", map_location="cpu", weights_only=False)
        assert apt["meta"]["iter"] == iterations
        assert all(torch.equal(tensor, apt["state_dict"][name]) for name, tensor in dense.items())
    assert any(name.endswith("running_mean") for name in dense)
    assert {name for name in apt["state_dict"] if name not in dense} == set(filter(is_new, apt["state_dict"]))
    steps = {int(state["step"]) for state in apt["optimizer"]["state"].values()}
    assert steps == {2}  # the second run went on where the first had ended
