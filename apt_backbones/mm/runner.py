"""mmengine's runner for long runs: safe checkpoints that fit the model, exact resuming, damaged data, divergence."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import distributed, nn

from ..checkpoint import load_converted, read_file, weights_of
from ..trunk import AdaptiveTrunk
from ..versions import require
from .data import seed_everything
from .loading import load_safely

require("onedl-mmengine", "0.10.12")

CHECKPOINT = re.compile(r"(?:iter|epoch)_(\d+)\.pth")  # as a run names them; published copies have other names
MAX_BAD_IMAGES = 100


@RUNNERS.register_module()
class APTRunner(Runner):
    """What changes:

    - Checkpoints are read safely and loaded strictly: mmengine executes what a checkpoint pickles and only warns of
      weights that are missing or of another shape. Here such a file is refused, and only ConvDown and ZeroMLP may be
      missing. .safetensors files are read, too.
    - Checkpoints appear whole or not at all, and a run resumes with the seed, the data and the random states that it
      would have had.
    - Damaged images are skipped in training, up to ``max_bad_images`` of the configuration (100), and listed in
      ``bad_images.txt`` of the work directory; in tests the first one ends the run by its name.
    - A loss that is not finite ends the run.
    - Normalization of the data that is not what the adaptive trunk undoes is refused.
    - Several processes can train on CPUs.

    Configs choose this class with ``runner_type = "APTRunner"``.
    """

    def __init__(self, model, work_dir: str, *args, resume: bool = False, load_from: str | None = None, **kwargs):
        if resume:
            load_from = load_from or latest_checkpoint(work_dir)
            seed = resumable(load_from).get("seed") if load_from else None
            if seed is not None:  # before samplers are made with another one
                kwargs["randomness"] = {**kwargs.get("randomness", {}), "seed": seed}
        super().__init__(model, work_dir, *args, resume=resume, load_from=load_from, **kwargs)
        self.register_hook(WatchHook(), priority="VERY_HIGH")

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        model = super().build_model(model)
        check_normalization(model)
        return model

    def build_optim_wrapper(self, *args):
        with misfits_named("optim_wrapper"):
            return super().build_optim_wrapper(*args)

    def build_train_loop(self, loop):
        report = os.path.join(self.work_dir, "bad_images.txt")
        self._guard(self._train_dataloader, self.cfg.get("max_bad_images", MAX_BAD_IMAGES), report)
        with misfits_named("train_dataloader or train_cfg"):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop):
        self._guard(self._val_dataloader)
        with misfits_named("val_dataloader, val_evaluator or val_cfg"):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop):
        self._guard(self._test_dataloader)
        with misfits_named("test_dataloader, test_evaluator or test_cfg"):
            return super().build_test_loop(loop)

    def _guard(self, loader, limit: int = 0, report: str | None = None) -> None:
        """Change the configuration of a data loader, in place."""
        is_config = isinstance(loader, dict) and isinstance(loader["dataset"], dict)
        if is_config and loader["dataset"]["type"] != "GuardedDataset":
            loader["dataset"] = dict(
                type="GuardedDataset", dataset=loader["dataset"], limit=limit, report=report, seed=self.seed
            )
            if report is not None:
                loader["sampler"] = dict(type="PositionSampler", sampler=loader["sampler"])

    def load_checkpoint(self, filename: str, map_location: str = "cpu", **kwargs) -> dict:
        """Load weights into the model; arguments beyond the file are accepted for mmengine's sake and not needed.

        Returns:
            The checkpoint's content, from which mmengine resumes.

        Raises:
            FileNotFoundError, ValueError: as ``read_checkpoint`` and ``load_converted``.
        """
        content = load_safely(filename)
        self.call_hook("after_load_checkpoint", checkpoint=content)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        model = model.module if isinstance(model, BaseTTAModel) else model
        load_converted(model, weights_of(content, filename), filename)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return content

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        """As mmengine's, under a temporary name until the file is whole."""
        kwargs["meta"] = {**(kwargs.get("meta") or {}), "by_epoch": kwargs.get("by_epoch", True)}
        unfinished = Path(out_dir, f".{filename}.unfinished")
        try:
            super().save_checkpoint(out_dir, unfinished.name, *args, **kwargs)
            if unfinished.is_file():  # in the main process
                os.replace(unfinished, Path(out_dir, filename))
        finally:
            unfinished.unlink(missing_ok=True)

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed and not torch.cuda.is_available() and not distributed.is_initialized():
            distributed.init_process_group("gloo")  # mmengine would ask for a GPU
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and not torch.cuda.is_available():  # mmengine would name GPUs
            return MMDistributedDataParallel(revert_sync_batchnorm(model), broadcast_buffers=False)
        return super().wrap_model(model_wrapper_cfg, model)


@contextmanager
def misfits_named(part: str) -> Iterator[None]:
    """Turn what classes say of arguments that they do not take into a ValueError with the configuration's part."""
    try:
        yield
    except TypeError as error:
        if "argument" not in str(error):  # within the class
            raise
        raise ValueError(f"{part}: {error}") from error


class WatchHook(Hook):
    """Sets the random states of every iteration by its number, so that a resumed run repeats them, and stops a run
    whose loss is not finite: every 50 iterations, and before a checkpoint is written."""

    def __init__(self):
        self._loss: torch.Tensor | None = None

    def before_train(self, runner: Runner) -> None:
        for unfinished in Path(runner.work_dir).glob(".*.unfinished"):  # of a run that was killed
            unfinished.unlink(missing_ok=True)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        by_epoch = checkpoint.get("meta", {}).get("by_epoch", True)
        if runner._resume and not by_epoch and isinstance(runner.train_loop, EpochBasedTrainLoop):
            runner.logger.warning(
                "resumed at the beginning of the epoch within which the checkpoint was saved: what the run had seen of "
                "it is seen again; default_hooks.checkpoint.by_epoch=True saves between epochs"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed_everything(runner.seed, runner.rank, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self._loss = (outputs or {}).get("loss")
        if self.every_n_inner_iters(batch_idx, 50):
            self._check(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._check(runner)

    def _check(self, runner: Runner) -> None:
        if self._loss is not None and not torch.isfinite(self._loss).all():
            raise ValueError(
                f"the loss is {float(self._loss)} near iteration {runner.iter}: the training has diverged; lower the "
                "learning rate, and resume from the last checkpoint or start anew"
            )


def latest_checkpoint(work_dir: str | Path) -> str | None:
    """The last whole checkpoint of a run, or None."""
    found = {}
    for path in Path(work_dir).glob("*.pth"):
        if (named := CHECKPOINT.fullmatch(path.name)) and path.stat().st_size:
            found[int(named[1])] = str(path)
    return found[max(found)] if found else None


def resumable(path: str | Path) -> dict:
    """``meta`` of a checkpoint that a run saved.

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``; or it holds weights only.
    """
    content = read_file(path, mmap=True)
    if not isinstance(content, dict) or not {"meta", "optimizer", "state_dict"} <= set(content):
        raise ValueError(
            f"{path} holds weights only; a run resumes from a checkpoint that it saved (iter_N.pth, epoch_N.pth). To "
            "start from weights, name them in load_from"
        )
    return content["meta"]


def check_normalization(model: nn.Module) -> None:
    """Raise ValueError if images are normalized otherwise than an adaptive trunk undoes before scoring them; also of a
    model in a wrapper, such as test-time augmentation's."""
    trunks = [part for part in model.modules() if isinstance(part, AdaptiveTrunk) and part.thresholds]
    preprocessors = [getattr(host, "data_preprocessor", None) for host in model.modules()]
    for trunk, by in product(trunks, [each for each in preprocessors if getattr(each, "mean", None) is not None]):
        for theirs, ours in ((by.mean, trunk.pixel_mean), (by.std, trunk.pixel_std)):
            if not torch.allclose(theirs.flatten().cpu().float(), torch.tensor(ours), atol=0.01):
                raise ValueError(
                    f"data_preprocessor normalizes by {[round(x, 3) for x in theirs.flatten().tolist()]}, the backbone "
                    f"undoes {[round(x, 3) for x in ours]} to score patches; give the backbone the same pixel_mean and "
                    "pixel_std"
                )
