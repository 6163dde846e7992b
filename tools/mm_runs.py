"""Tests of one model under several settings in one process: quiet, with a progress bar, and timed in turn."""

import contextlib
import copy
import io
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from pycocotools.cocoeval import COCOeval, Params
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from apt_backbones.images import evenly, representative
from apt_backbones.mm.cls import now
from apt_backbones.trunk import find_trunk
from tools.mm_config import build_runner, is_classifier
from tools.patch_settings import native_side
from tools.steps import console, digest, stamps, track

TIMED_IMAGES, TIMED_ROUNDS = 10, 3
COUNTED_IMAGES = 200  # of which the timed ones are chosen
SUMS_OVER_IMAGES = ("IoUMetric", "TrimapIoUMetric", "TopAccuracy")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the toolboxes say of themselves."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Bar(Hook):
    """A progress bar of a run's iterations; also a context, at whose end it goes."""

    def __init__(self, title: str):
        columns = ("      {task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=None)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def before_train(self, runner: Runner) -> None:
        self.progress.update(self.task, total=runner.max_iters, completed=runner.iter)

    def before_test(self, runner: Runner) -> None:
        self.progress.update(self.task, total=len(runner.test_dataloader), completed=0)

    def after_train_iter(self, *_, **__) -> None:
        self.progress.advance(self.task)

    after_test_iter = after_train_iter


def trunk_of(cfg: Config) -> dict:
    """The part of a configuration that has the trunk's thresholds and scorer."""
    return cfg.model if is_classifier(cfg) else cfg.model.backbone


def scorer_of(cfg: Config) -> str:
    return trunk_of(cfg).get("scorer", "entropy")


def ratios_of(thresholds: Mapping[int, float]) -> list[float]:
    """Of each size's threshold to the smallest size's, about."""
    first = thresholds[min(thresholds)]
    return [float(f"{thresholds[size] / first:.2g}") if first else 1.0 for size in sorted(thresholds)]


def rgb_of(image: Tensor) -> Tensor:
    """Images (B, 3, height, width) of mmdetection's and mmsegmentation's data sets, which are BGR."""
    return image.flip(1)


def tested_images(
    dataset: Dataset, most: int | None = None, pixels_of: Callable[[Tensor], Tensor] = rgb_of
) -> Iterator[Tensor]:
    """The images of a test set as the model sees them, float32 (1, 3, height, width) in 0..255, without padding.

    Args:
        most: take at most so many, evenly; None for all.
        pixels_of: what makes RGB in 0..255 of the data set's images.
    """
    for index in track(evenly(len(dataset), most), "images"):
        yield pixels_of(dataset[index]["inputs"][None].float())


def data_key(dataset: Dataset) -> str:
    """What stands for a data set: its annotations, and names, sizes and dates of its files."""
    if hasattr(dataset, "samples"):  # torchvision's
        items, files = dataset.samples, [file for file, _ in dataset.samples]
    else:
        items = [dataset.get_data_info(index) for index in range(len(dataset))]
        files = [item[name] for item in items for name in ("img_path", "seg_map_path") if name in item]
        files.append(getattr(dataset, "ann_file", ""))
    return digest([items, stamps(file for file in files if file and Path(file).is_file())])


def side_of(dataset: dict) -> int:
    """Side in pixels of the images of a classifier's data set."""
    return dataset.get("img_size") or native_side(dataset["model"])


def sides_of(scale: int | Sequence[int]) -> tuple[int, ...]:
    """What mmcv's ``Resize`` takes for its ``scale``."""
    return (scale, scale) if isinstance(scale, int) else tuple(scale)


def rescaled(cfg: Config, scale: float, patch_size: int) -> Config:
    """A copy of a configuration whose test has images, crops and padding of another scale.

    Args:
        patch_size: in whole numbers of which squares are padded.
    """

    def sides(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(round(scale * value) for value in values)

    cfg = copy.deepcopy(cfg)
    dataset = cfg.test_dataloader.dataset
    if is_classifier(cfg):
        dataset.img_size = round(scale * side_of(dataset))
        cfg.model.model_options = {**cfg.model.get("model_options", {}), "dynamic_img_size": True}
        return cfg
    preprocessor, test_cfg = cfg.model.data_preprocessor, cfg.model.test_cfg
    for step in dataset.pipeline:
        if "scale" in step:
            if preprocessor.get("pad_size_divisor", 1) >= min(sides_of(step.scale)):  # it pads to squares
                preprocessor.pad_size_divisor = round(scale * preprocessor.pad_size_divisor / patch_size) * patch_size
            step.scale = sides(sides_of(step.scale))
    if "crop_size" in test_cfg:
        test_cfg.update(crop_size=sides(test_cfg.crop_size), stride=sides(test_cfg.stride))
    return cfg


def build(cfg: Config) -> Runner:
    """A runner that keeps apart from others in the same process, and says only what went wrong."""
    cfg.experiment_name = f"run {time.time()}"
    if "visualizer" in cfg:
        cfg.visualizer.name = cfg.experiment_name
    cfg.log_level = "ERROR"
    return build_runner(cfg)


def test_with_samples(runner: Runner, draws: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Metrics of a test, and of samples of its images drawn with replacement: the same ones in every test of as many
    images. Of metrics that are neither sums over images nor COCO's average precision there are no samples."""
    metrics, kept = [m for m in runner.test_loop.evaluator.metrics if type(m).__name__ in SUMS_OVER_IMAGES], []

    def keep(metric: BaseMetric, results: list) -> dict:
        kept.append((metric, results))
        return type(metric).compute_metrics(metric, results)

    for metric in metrics:
        metric.compute_metrics = partial(keep, metric)
    with _evaluations() as evaluations:
        found = runner.test()
    precisions = [ResampledPrecision(evaluation, areas=2) for evaluation in evaluations]
    for metric in metrics:
        del metric.compute_metrics
    if not kept and not precisions:
        return _as_floats(found), []
    count, chance, samples = len(kept[0][1]) if kept else precisions[0].images, random.Random(0), []
    for _ in track(range(draws), "samples of the images"):
        chosen, sample = chance.choices(range(count), k=count), {}
        for metric, results in kept:
            values = metric.compute_metrics([results[index] for index in chosen])
            sample |= {f"{metric.prefix}/{name}" if metric.prefix else name: value for name, value in values.items()}
        for precision in precisions:
            sample |= precision.metrics(chosen)
        samples.append(_as_floats(sample))
    return _as_floats(found), samples


class ResampledPrecision:
    """COCO's average precision of other choices of the images of an evaluation, objects and all.

    Args:
        evaluation: a finished one.
        areas: of so many ranges of the objects' areas; the first are any, and small objects.

    Attributes:
        images: how many it is of.
    """

    def __init__(self, evaluation: COCOeval, areas: int):
        self.evaluation, self.params = evaluation, copy.copy(evaluation.params)
        self.images = len(self.params.imgIds)
        self._found = np.array(evaluation.evalImgs, object).reshape(-1, len(self.params.areaRng), self.images)
        self.params.areaRng, self.params.maxDets = self.params.areaRng[:areas], self.params.maxDets[-1:]

    def of(self, images: Sequence[int]) -> np.ndarray:
        """Precisions (thresholds, recalls, classes, areas), -1 where nothing is to be found, of the images with these
        numbers in the evaluation, some of them several times."""
        self.evaluation.evalImgs = self._found[:, :, images].flatten().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluation.accumulate(self.params)
        return self.evaluation.eval["precision"][..., 0]

    def metrics(self, images: Sequence[int]) -> dict[str, float]:
        """As mmdetection names them."""
        precision = self.of(images)
        half = precision[np.isclose(self.params.iouThrs, 0.5)]
        found = {"mAP": precision[..., 0], "mAP_50": half[..., 0], "mAP_s": precision[..., 1]}
        return {f"coco/{self.params.iouType}_{name}": mean_precision(values) for name, values in found.items()}


def mean_precision(precision: np.ndarray) -> float:
    """Over all that is to be found; -1 if nothing is, as COCO has it."""
    counted = precision[precision > -1]
    return float(counted.mean()) if len(counted) else -1.0


@contextlib.contextmanager
def _evaluations() -> Iterator[list[COCOeval]]:
    """COCO's evaluations of classes that are made meanwhile."""
    made, accumulate = [], COCOeval.accumulate

    def keep(evaluation: COCOeval, params: Params | None = None) -> None:
        if evaluation.params.useCats:
            made.append(evaluation)
        accumulate(evaluation, params)

    with mock.patch.object(COCOeval, "accumulate", keep):
        yield made


def _as_floats(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def time_interleaved(runners: Mapping[str, Runner], set_up: Callable[[str], object] = str) -> dict[str, float]:
    """Seconds per image: the mean over images, of each the median over rounds relative to the first runner.

    Interleaved: every image goes through all models, so that whatever else the machine does hits all of them alike.
    Images differ in how much of them merges, so those are taken that keep as many tokens as the test set does.

    Args:
        runners: by title; their models are ready for ``test_step``.
        set_up: is called with a title before its model is counted or timed.
    """
    first = next(iter(runners))
    images = timed_images(runners, set_up)
    batches = {id(runner): [_batch(runner, image) for image in images] for runner in runners.values()}
    seconds = {title: np.zeros((len(images), TIMED_ROUNDS)) for title in runners}
    for index in track(range(len(images)), "images"):
        for round_ in range(TIMED_ROUNDS + 1):
            for title, runner in runners.items():
                set_up(title)
                start = now()
                runner.model.test_step(batches[id(runner)][index])
                if round_:  # the first round warms up
                    seconds[title][index, round_ - 1] = now() - start
    of_first = np.median(seconds[first], 1)
    return {title: float(np.mean(of_first * np.median(s / seconds[first], 1))) for title, s in seconds.items()}


def timed_images(runners: Mapping[str, Runner], set_up: Callable[[str], object]) -> list[int]:
    """Numbers of ``TIMED_IMAGES`` images of the test set whose mean tokens, under every title, are those of the whole
    set, as nearly as some thousand random choices come to it; arguments as of ``time_interleaved``."""
    candidates = evenly(len(next(iter(runners.values())).test_dataloader.dataset), COUNTED_IMAGES)
    tokens = {title: [] for title in runners}
    for image in track(candidates, "counting tokens"):
        batches = {id(runner): _batch(runner, image) for runner in runners.values()}
        for title, runner in runners.items():
            set_up(title)
            trunk = find_trunk(runner.model)
            inputs = runner.model.data_preprocessor(batches[id(runner)], False)["inputs"]
            bottom, right = (-side % trunk.patch_size for side in inputs.shape[2:])
            tokens[title].append(trunk.layout(F.pad(inputs, (0, right, 0, bottom))).num_tokens)
    chosen = representative(np.array([*tokens.values()]), TIMED_IMAGES)
    return [candidates[index] for index in chosen]


def _batch(runner: Runner, image: int) -> dict:
    loader = runner.test_dataloader
    return loader.collate_fn([loader.dataset[image]])
