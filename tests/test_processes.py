"""Detection and segmentation in several processes: one step of the short fine-tune has the gradients of one process
that handles the same images, and a process that dies ends the others. The others' tests: test_long_runs.py
(classification) and test_llava_interruption.py."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import apt_backbones.mm.det
import apt_backbones.mm.seg  # noqa: F401
from apt_backbones import find_trunk
from apt_backbones.mm import APTRunner
from apt_backbones.mm.data import seed_everything
from tests.golden import relative_error

from .processes import end, preload, run_ranks, start_ranks

preload(__name__)
SIDE = {"det": 192, "seg": 80}
# Of each rank's two images.
CONTENTS = {
    "objects": ("objects", "objects"),
    "nothing merges": ("nothing merges", "nothing merges"),
    "no annotations": ("no annotations", "no annotations"),
    "mixed": ("nothing merges", "no annotations"),
}


class KeptGradients(OptimWrapper):
    """Sums losses up as mmengine's gradient accumulation does, and leaves the gradients to be looked at."""

    def zero_grad(self, **kwargs) -> None:
        pass


def example(task: str, content: str, seed: int) -> tuple[Tensor, DetDataSample | SegDataSample]:
    """An image that is noise on the right and, unless nothing shall merge, plain on the left, and one object."""
    side, generator = SIDE[task], torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    if content != "nothing merges":
        image[:, :, : side // 2] = 20 * seed
    objects = torch.zeros(0 if content == "no annotations" else 1, side, side, dtype=torch.uint8)
    objects[:, side // 4 : side // 2, side // 4 :] = 1
    meta = dict(img_shape=(side, side), ori_shape=(side, side), batch_input_shape=(side, side), scale_factor=(1, 1))
    if task == "det":
        sample = DetDataSample(metainfo=meta)
        boxes = torch.tensor([[side / 4, side / 4, side, side / 2]])[: len(objects)]
        masks = BitmapMasks(np.array(objects), side, side)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.ones(len(boxes)).long(), masks=masks)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    else:
        sample = SegDataSample(metainfo=meta)
        ignored = torch.full((1, side, side), 255)
        sample.gt_sem_seg = PixelData(data=objects.long() if len(objects) else ignored)
    return image, sample


def batch(task: str, contents: tuple[str, ...], ranks: tuple[int, ...]) -> dict:
    """The images of some ranks."""
    kinds = [(2 * rank + index, kind) for rank in ranks for index, kind in enumerate(CONTENTS[contents[rank]])]
    images, samples = zip(*(example(task, kind, seed) for seed, kind in kinds))
    return dict(inputs=list(images), data_samples=list(samples))


def detector_or_segmenter(task: str, folder: Path, launcher: str) -> APTRunner:
    """The tiny trained model, of which all but the new layers is frozen."""
    cfg = Config.fromfile(f"{task}_configs/eva02_tiny_apt_photoshapes.py")
    runner = APTRunner(
        cfg.model,
        str(folder),
        default_scope=cfg.default_scope,
        launcher=launcher,
        randomness=dict(seed=3),
        experiment_name=str(folder),
    )
    runner.load_checkpoint(f"{task}_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors")
    nn.init.normal_(find_trunk(runner.model).adaptive_embed.zero_mlp.weight, std=0.02)
    return runner


def gradients(
    rank: int,
    task: str,
    contents: tuple[str, ...],
    folder: Path,
    launcher: str,
    batches: list[tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Of the new layers, over some ranks' batches one after the other; None for this rank's own."""
    runner = detector_or_segmenter(task, folder, launcher)
    batches = batches or [(rank,)]
    new = {name.removeprefix("module."): p for name, p in runner.model.named_parameters() if p.requires_grad}
    wrapper = KeptGradients(torch.optim.SGD(new.values(), lr=0.0), accumulative_counts=len(batches))
    runner.model.train()
    for ranks in batches:
        seed_everything(3, ranks[0], 0)  # as APTRunner does: mmdet samples regions at random
        runner.model.train_step(batch(task, contents, ranks), optim_wrapper=wrapper)
        layout = find_trunk(runner.model).last_layout
        assert (layout.num_tokens < layout.batch_size * layout.grid[0] ** 2) == (contents[ranks[0]] != "nothing merges")
    return {name: parameter.grad for name, parameter in new.items()}


def assert_equal_to_one_process(task: str, contents: tuple[str, ...], tmp_path: Path) -> None:
    """To one with each batch in turn and, where the loss is a mean over pixels, to one with all images at once."""
    ranks = tuple(range(len(contents)))
    results = run_ranks(len(ranks), tmp_path / "several", gradients, task, contents, tmp_path, "pytorch")
    in_turn, at_once = [(rank,) for rank in ranks], [ranks]
    for batches in (in_turn, at_once) if task == "seg" else (in_turn,):
        (expected,) = run_ranks(1, tmp_path / "one", gradients, task, contents, tmp_path, "none", batches)
        assert len(expected) == 4 and all(gradient.any() for gradient in expected.values())
        for result in results:
            for name, gradient in expected.items():
                assert relative_error(result[name], gradient) <= 1e-4, name


@pytest.mark.parametrize("task", ["det", "seg"])
@pytest.mark.parametrize("second", list(CONTENTS)[1:])
def test_two_processes_have_the_gradients_of_one(task, second, tmp_path):
    """Whatever the second one gets: each process normalizes its losses itself, and the gradients are averaged."""
    assert_equal_to_one_process(task, ("objects", second), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["det", "seg"])
def test_four_processes_have_the_gradients_of_one(task, tmp_path):
    assert_equal_to_one_process(task, tuple(CONTENTS), tmp_path)


def _train_until_killed(rank: int, task: str, folder: Path) -> None:
    runner = detector_or_segmenter(task, folder, "pytorch")
    new = [parameter for parameter in runner.model.parameters() if parameter.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(new, lr=0.0))
    for step in range(10_000):
        runner.model.train_step(batch(task, ("objects", "objects"), (rank,)), optim_wrapper=wrapper)
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("task", ["det", "seg"])
def test_a_killed_process_ends_the_others_within_a_minute(task, tmp_path):
    """Without a launcher that would end them, as on another machine."""
    survivor, killed = start_ranks(2, tmp_path, _train_until_killed, task, tmp_path)
    assert end(killed) == -signal.SIGKILL
    assert end(survivor, timeout=60) == 1
    error = r"RuntimeError: \[\S*gloo\S*\] .*Connection (closed|reset) by peer"  # which one depends on the moment
    assert re.search(error, (tmp_path / "0.log").read_text())
