"""Which patches an image gets; the one place where processor and vision tower agree on it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from apt_backbones.scores import check_scorer
from apt_backbones.selection import MERGE_MODES, check_choice, clean_thresholds, drop_at_random
from apt_backbones.selection import patch_sides as selected_sides

PAPER_THRESHOLD = 5.75  # bits, for patches of twice the base side (APT, section 4.3)


def resolve_thresholds(thresholds: Mapping[int | str, float] | None, patch_size: int) -> dict[int, float]:
    """Thresholds by size in pixels; None gives the paper's single merged size. See ``clean_thresholds``."""
    return {2 * patch_size: PAPER_THRESHOLD} if thresholds is None else clean_thresholds(thresholds, patch_size)


def check_modes(scorer: str, merge: str) -> None:
    """Raise ValueError unless the scorer and the merge mode are known, FileNotFoundError for a missing scorer file."""
    check_scorer(scorer)
    check_choice("merge", merge, MERGE_MODES)


@torch.no_grad()
def patch_sides(
    pixels: Tensor, thresholds: Mapping[int, float], patch_size: int, scorer: str = "entropy", merge: str = "apt"
) -> Tensor:
    """Side of the patch that covers each base cell (B, H, W), as ``apt_backbones.selection.patch_sides`` gives it;
    with "random" as many cells are kept as there would be patches, and the others are 0."""
    sides_BHW = selected_sides(pixels, thresholds, patch_size, scorer)
    return drop_at_random(sides_BHW, patch_size) if merge == "random" and thresholds else sides_BHW


def count_tokens(sides_HW: Tensor | np.ndarray, patch_size: int) -> int:
    """Number of patches of one image: a patch of n cells counts n times 1 / n; dropped cells count nothing."""
    sides_HW = torch.as_tensor(sides_HW)
    sides_HW = sides_HW[sides_HW > 0]
    return round(float((patch_size / sides_HW).square().sum()))
