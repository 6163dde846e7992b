"""A fine-tune without labels: the new layers learn that merged patches give what the dense network gives.

Legend: B images, C channels, H x W base cells.
"""

import math
import random
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..distance import merging_off
from ..distill import ViewSettings, cut_view
from ..freeze import freeze_host
from ..images import read_rgb
from ..trunk import AdaptiveTrunk, find_trunk
from .runner import APTRunner

LOSSES = ("features", "probabilities")


class RandomViews(Dataset):
    """Random views of image files, uint8 (3, height, width); item i is the same in every run.

    Args:
        paths: the files, gone through in a new random order again and again.
        settings: how views are cut; ``copies`` does not matter.
        length: number of items.
        prepare: an image as its file has it -> as large as the model sees it.
    """

    def __init__(self, paths: Sequence[Path], settings: ViewSettings, length: int, prepare: Callable):
        self.paths, self.settings, self.length, self.prepare = list(paths), settings, length, prepare

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        turn, place = divmod(index, len(self.paths))
        order = random.Random(f"{self.settings.seed} {turn}").sample(range(len(self.paths)), len(self.paths))
        image = self.prepare(read_rgb(self.paths[order[place]]))
        return cut_view(image, self.settings, random.Random(f"{self.settings.seed} {index}"))


class Matching(BaseModel):
    """What trains: a model learns to say of fewer tokens what it says of all of them.

    Args:
        model: with an adaptive trunk.
        outputs: pixels (B, 3, height, width) in 0..255 to features or probabilities (B, C, ...), by this model: maps,
            or what it says of whole images.
        loss: of ``distance_from``.

    Raises:
        ValueError: an unknown loss.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Tensor], Tensor], loss: str = "features"):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(LOSSES)}")
        self.model, self.outputs, self.loss = model, outputs, loss
        self.trunk_of_model = [find_trunk(model)]  # in a list: its weights belong to the model

    @property
    def trunk(self) -> AdaptiveTrunk:
        return self.trunk_of_model[0]

    def init_weights(self) -> None:
        """Nothing: mmengine's would draw the frozen weights of timm's networks anew."""


class FeatureMatching(Matching):
    """The model with merging learns to say what it says without; all but its new layers are frozen.

    Raises:
        ValueError: the model has no new layers, or its trunk merges nothing.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Tensor], Tensor], loss: str = "features"):
        super().__init__(freeze_host(model), outputs, loss)
        if not any(self.trunk.thresholds.values()):
            raise ValueError("nothing merges under these thresholds, so there is nothing to learn")

    def forward(self, pixels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """``loss``, and for the log ``distance``, the same, and ``kept``, the share of tokens."""
        pixels = pixels.float()
        with torch.no_grad(), merging_off(self.trunk):
            dense = self.outputs(pixels).float()
        merged = self.outputs(pixels).float()
        layout = self.trunk.last_layout
        distance = distance_from(dense, merged, self.loss)
        patches = layout.num_tokens - layout.batch_size * layout.num_prefix
        kept = patches / (layout.batch_size * math.prod(layout.grid))
        return {"loss": distance, "distance": distance.detach(), "kept": distance.new_tensor(kept)}


def distance_from(dense: Tensor, found: Tensor, loss: str) -> Tensor:
    """How far outputs (B, C, ...) are from the dense network's, a scalar.

    Args:
        loss: "features" (squared distance over the dense features' variance, channel by channel for maps) or
            "probabilities" (Kullback-Leibler divergence from the dense ones).

    Raises:
        ValueError: "features" of a single place, which have no variance.
    """
    if loss == "probabilities":
        logarithms = [part.clamp(min=1e-8).log() for part in (dense, found)]
        return (dense * (logarithms[0] - logarithms[1])).sum(1).mean()
    over = [dim for dim in range(dense.ndim) if dim != 1]
    if dense.numel() == dense.shape[1]:
        raise ValueError("features of a single place have no variance; give a batch of at least 2 images")
    variance_C = dense.var(over).clamp(min=1e-6)
    if dense.ndim == 2:  # too few of a batch to tell one channel's
        variance_C = variance_C.mean()
    return ((found - dense).square().mean(over) / variance_C).mean()


def finetune_features(
    model: nn.Module,
    outputs: Callable[[Tensor], Tensor],
    paths: Sequence[Path],
    views: ViewSettings,
    work_dir: Path,
    loss: str = "features",
    **options,
) -> dict[str, list[float]]:
    """Train a model's new layers in place; an interrupted run goes on from its last checkpoint.

    Args:
        model, outputs, loss: see ``FeatureMatching``.
        paths, views, work_dir, options: see ``train``.

    Returns:
        The curve: name -> value of every iteration ("distance", "kept").

    Raises:
        ValueError: as ``FeatureMatching``; or fewer than 2 iterations.
    """
    return train(FeatureMatching(model, outputs, loss), paths, views, work_dir, **options)


def train(
    matching: Matching,
    paths: Sequence[Path],
    views: ViewSettings,
    work_dir: Path,
    iterations: int = 1000,
    batch: int = 4,
    rate: float = 1e-3,
    workers: int = 2,
    prepare: Callable = lambda image: image,
) -> dict[str, list[float]]:
    """Train in place; an interrupted run goes on from its last checkpoint.

    Args:
        matching: what trains.
        paths: image files.
        views: how training views are cut from them.
        work_dir: for mmengine's logs and checkpoints.
        iterations, batch: steps, and views of a step.
        rate: the highest learning rate, of AdamW.
        workers: processes that read images.
        prepare: an image as its file has it -> as large as the model sees it.

    Returns:
        The curve: name -> value of every iteration, of what ``matching`` logs.

    Raises:
        ValueError: fewer than 2 iterations.
    """
    if iterations < 2:
        raise ValueError(f"at least 2 iterations are needed, not {iterations}")
    dataset = RandomViews(paths, views, iterations * batch, prepare)
    warm_up = iterations // 10
    # Of a single step mmengine's LinearLR never leaves the first factor.
    warming = [dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=warm_up)] if warm_up > 1 else []
    runner = APTRunner(
        matching,
        str(work_dir),
        train_dataloader=DataLoader(
            dataset, batch, sampler=DefaultSampler(dataset, shuffle=False), num_workers=workers, collate_fn=_collate
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=rate, weight_decay=0.0), clip_grad=dict(max_norm=1.0, norm_type=2)
        ),
        param_scheduler=[
            *warming,
            dict(type="CosineAnnealingLR", by_epoch=False, begin=warm_up, T_max=iterations - warm_up),
        ],
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=10),
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max(1, iterations // 20), max_keep_ckpts=1),
        ),
        resume=True,
        default_scope="mmengine",
        experiment_name=f"finetune_features_{uuid.uuid4().hex}",  # mmengine refuses to use a name twice in a process
    )
    runner.train()
    matching.model.eval()
    scalars = {name.removeprefix("train/"): scalar for name, scalar in runner.message_hub.log_scalars.items()}
    return {name: scalars[name].data[0].tolist() for name in ("distance", "kept") if name in scalars}


def _collate(views: list[Tensor]) -> dict[str, Tensor]:
    return {"pixels": torch.stack(views)}
