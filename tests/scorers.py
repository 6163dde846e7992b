"""Learned scorers with random weights."""

from pathlib import Path

import torch
from torch import nn

from apt_backbones.learned import LearnedScorer, ScorerTail, in_fixed_point


def random_scorer(patch_size: int, sizes: int = 1) -> LearnedScorer:
    """One that was distilled from nothing."""
    pixels = torch.rand(2, 3, 8 * patch_size, 8 * patch_size) * 255
    return in_fixed_point(nn.Conv2d(3, 8, patch_size, patch_size), ScorerTail(8, sizes), pixels, {"model": "random"})


def save_scorer(path: Path, patch_size: int, sizes: int = 1) -> str:
    """Write one; returns the file's name."""
    random_scorer(patch_size, sizes).save(path)
    return str(path)


def give_scorer(cfg, folder: Path) -> None:
    """Where a configuration names a learned scorer that users distil, a random one."""
    model = cfg.model.get("module", cfg.model)
    if (scorer := model.backbone.get("scorer", "")).endswith(".safetensors") and not Path(scorer).is_file():
        sizes = model.backbone.thresholds
        model.backbone.scorer = save_scorer(folder / "scorer.safetensors", min(sizes) // 2, len(sizes))
