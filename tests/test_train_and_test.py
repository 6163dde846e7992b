"""tools/train.py and tools/test.py before anything trains: their flags, and mistakes that end in one line."""

from argparse import Namespace

import pytest
import torch

from apt_backbones.checkpoint import read_file
from tests.scripts import ROOT, data_options, evaluator_options, run_script
from tools import cli, mm_config, test, train

DET, SEG = "det_configs/eva02_tiny_apt_photoshapes.py", "seg_configs/eva02_tiny_apt_photoshapes.py"
DET_WEIGHTS, SEG_WEIGHTS = (
    f"{task}_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors" for task in ("det", "seg")
)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def load(config, work_dir=None, **options):
    return mm_config.load_config(
        Namespace(config=config, work_dir=work_dir, cfg_options=options, launcher="none", local_rank=0)
    )


def test_thresholds_named_on_the_command_line_replace_those_of_the_file():
    cfg = load(DET, **{"model.backbone.thresholds.16": 0.5})
    assert dict(cfg.model.backbone.thresholds) == {16: 0.5, 32: 0.0046}


def test_other_settings_replace_those_of_the_file():
    cfg = load(DET, **{"model.backbone.scorer": "entropy", "train_cfg.max_iters": 7})
    assert (cfg.model.backbone.scorer, cfg.train_cfg.max_iters) == ("entropy", 7)


def test_every_config_has_a_work_dir_of_its_own():
    assert load(DET).work_dir == "work_dirs/det/eva02_tiny_apt_photoshapes"
    assert load(SEG).work_dir == "work_dirs/seg/eva02_tiny_apt_photoshapes"
    assert load(SEG, work_dir="elsewhere").work_dir == "elsewhere"


@pytest.mark.parametrize("config", [DET, SEG])
def test_short_fine_tunes_start_from_where_dense_training_writes(config):
    dense = load(config.replace("apt", "dense"))
    assert load(config).load_from == f"{dense.work_dir}/iter_{dense.train_cfg.max_iters}.pth"


NO_DATA = ["--cfg-options", "test_dataloader.dataset.data_root=nowhere", "train_dataloader.dataset.data_root=nowhere"]


@pytest.mark.parametrize(
    "tool, arguments, message",
    [
        ("test.py", ["none.py", "x.pth"], "no configuration at none.py"),
        ("test.py", ["README.md", "x.pth"], "README.md is not a configuration file"),
        ("test.py", ["det_configs/_base_/runtime.py", "x.pth"], "configures no model"),
        ("test.py", ["det_configs/eva02_l_apt_1536.py", "x.pth"], "no data at data/coco/; put COCO there: train2017/"),
        ("test.py", [DET, "x.pth", *NO_DATA], "no data at nowhere; put the data set there"),
        ("train.py", [DET, *NO_DATA], "no data at nowhere"),
        ("train.py", [DET, "--accumulate", "0"], "--accumulate must be at least 1"),
        ("train.py", [DET, "--accumulate", "2", "--auto-scale-lr"], "give either it or --accumulate"),
        ("train.py", ["seg_configs/eva02_l_apt_512.py"], "no data at data/ade/ADEChallengeData2016; put ADE20K there"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, tmp_path, tool, arguments, message):
    for name in ("README.md", "det_configs", "seg_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)  # a folder without data
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, f"tools/{tool}", *arguments)
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


def test_missing_photoshapes_are_made_by_a_command(monkeypatch, tmp_path):
    cfg = load(DET)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python examples/make_photoshapes.py data/photoshapes"):
        mm_config.check_data(cfg, ["test_dataloader"])


def test_a_missing_checkpoint_is_named_before_data_are_read(monkeypatch, tmp_path):
    for tool in ("test.py", "train.py"):
        here = [f"{name}_dataloader.dataset.data_root={tmp_path}" for name in ("train", "val", "test")]
        checkpoint = [tmp_path / "none.pth"] if tool == "test.py" else []
        load_from = [f"load_from={tmp_path}/none.pth"]
        with pytest.raises(SystemExit, match=r"error: no checkpoint at .*none\.pth"):
            run_script(monkeypatch, f"tools/{tool}", DET, *checkpoint, "--cfg-options", *here, *load_from)


@pytest.fixture
def few_options(photoshapes, tmp_path):
    """Settings of a run of a detector or segmenter on two images of PhotoShapes."""

    def options(config, **more):
        of_detector = evaluator_options(photoshapes) if config == DET else {}
        # A name of its own, because mmengine keeps visualizers by name.
        few = {
            "visualizer.name": tmp_path.name,
            "test_dataloader.dataset.indices": 2,
            "val_dataloader.dataset.indices": 2,
        }
        found = data_options(photoshapes) | of_detector | few | more
        return ["--cfg-options", *(f"{name}={value}" for name, value in found.items())]

    return options


@pytest.mark.parametrize("config, weights", [(DET, DET_WEIGHTS), (SEG, SEG_WEIGHTS)], ids=["detector", "segmenter"])
def test_every_image_of_a_test_can_be_painted(config, weights, few_options, tmp_path):
    flags = ["--work-dir", str(tmp_path / "run"), "--show-dir", str(tmp_path / "painted")]
    test.main([config, weights, *flags, *few_options(config)])
    assert len(list((tmp_path / "painted").rglob("*.*g"))) == 2


def test_a_toolbox_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_mmseg.py").write_text("raise ModuleNotFoundError('No module', name='mmseg')")
    (tmp_path / "x.py").write_text("custom_imports = dict(imports=['of_mmseg'])")
    with pytest.raises(ImportError, match=r'x.py needs mmseg: pip install -e "\.\[seg\]"$'):
        mm_config.read_config(str(tmp_path / "x.py"))


def test_steps_of_several_batches_follow_the_same_schedule(few_options, tmp_path):
    """The short fine-tune of 3,000 steps with 16 batches a step: what counts batches becomes 16 times as large."""
    cfg = mm_config.read_config("det_configs/eva02_l_apt_1536.py")
    mm_config.accumulate(cfg, 16)
    warmup, decay = cfg.param_scheduler
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (48000, 16000)
    assert (warmup.begin, warmup.end, decay.milestones) == (0, 800, [38400, 43200])
    assert cfg.default_hooks.checkpoint.interval == 16 * 2500
    steps, periods = (
        dict(type="StepLR", by_epoch=False, step_size=100),
        dict(type="ExponentialLR", by_epoch=False, gamma=0.81),
    )
    cfg.param_scheduler = [steps, dict(type="OneCycleLR", by_epoch=False, total_steps=1e3), periods]
    mm_config.accumulate(cfg, 2)
    steps, cycle, decay = cfg.param_scheduler
    assert (steps.step_size, cycle.total_steps, decay.gamma) == (200, 2000, pytest.approx(0.9))
    cfg.param_scheduler = warmup  # mmengine takes one alone, and none
    mm_config.accumulate(cfg, 2)
    assert cfg.param_scheduler.end == 2 * 800
    cfg.param_scheduler = None
    mm_config.accumulate(cfg, 2)
    assert cfg.optim_wrapper.accumulative_counts == 2

    schedule = {
        "param_scheduler.1.begin": 1,
        "param_scheduler.1.end": 2,
        "train_cfg.max_iters": 2,
        "default_hooks.checkpoint.interval": 1,
    }
    options = few_options(SEG, load_from=SEG_WEIGHTS, **schedule)
    train.main([SEG, "--work-dir", str(tmp_path), "--accumulate", "3", *options])
    kept = {file.name: read_file(file) for file in tmp_path.glob("iter_*.pth")}
    assert set(kept) == {"iter_3.pth", "iter_6.pth"}
    steps = {int(state["step"]) for state in kept["iter_6.pth"]["optimizer"]["state"].values()}
    assert steps == {2}


def test_a_configuration_for_half_precision_trains_without_a_gpu(few_options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    amp = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.dtype": "bfloat16", "load_from": SEG_WEIGHTS}
    options = few_options(SEG, **amp, **{"train_cfg.max_iters": 1, "train_dataloader.batch_size": 2})
    train.main([SEG, "--work-dir", str(tmp_path), *options])
    assert (tmp_path / "iter_1.pth").is_file()


@pytest.mark.parametrize(
    "tool, setting, message",
    [
        (test, {"test_dataloader.dataset.pipelines": 1}, "test_dataloader, .*unexpected keyword argument 'pipelines'"),
        (test, {"model.backbone.depht": 1}, "unexpected keyword argument 'depht'"),
        (train, {"optim_wrapper.optimizer.lrr": 1}, "optim_wrapper: .*unexpected keyword argument 'lrr'"),
    ],
)
def test_settings_that_a_class_does_not_take_are_named(tool, setting, message, few_options, tmp_path):
    checkpoint = [SEG_WEIGHTS] if tool is test else []
    options = few_options(SEG, load_from=SEG_WEIGHTS, **setting)
    with pytest.raises(ValueError, match=message):
        tool.main([SEG, *checkpoint, "--work-dir", str(tmp_path), *options])


def test_checkpoints_of_another_model_end_in_one_line():
    def main():
        from apt_backbones import load_converted

        load_converted(torch.nn.Linear(1, 1), {"weight": torch.zeros(2, 1)})

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert "of another model: 1 entries (bias) missing; 1 entries (weight (2, 1) instead of (1, 1))" in stop.value.code


def test_errors_of_the_program_itself_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
