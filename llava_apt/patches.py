"""Which patches an image gets; the one place where processor and vision tower agree on it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from apt_backbones import drop_at_random, score_patches, select_patches
from apt_backbones.embed import MERGE_MODES
from apt_backbones.scores import SCORERS, check_thresholds

PAPER_THRESHOLD = 5.75  # bits, for patches of twice the base side (APT, section 4.3)


def resolve_thresholds(thresholds: Mapping[int | str, float] | None, patch_size: int) -> dict[int, float]:
    """Thresholds by size in pixels; None gives the paper's single merged size. JSON's string keys become integers.

    Raises:
        ValueError: sizes that do not double from the base patch, or thresholds that are no numbers.
    """
    if thresholds is None:
        return {2 * patch_size: PAPER_THRESHOLD}
    return check_thresholds({int(size): float(threshold) for size, threshold in thresholds.items()}, patch_size)


def check_modes(scorer: str, merge: str) -> None:
    """Raise unless the scorer and the merge mode are known."""
    for name, value, choices in (("scorer", scorer, SCORERS), ("merge", merge, MERGE_MODES)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def patch_sides(
    pixels: Tensor, thresholds: Mapping[int, float], patch_size: int, scorer: str = "entropy", merge: str = "apt"
) -> Tensor:
    """Side of the patch that covers each base cell, as ``unchecked_patch_sides`` gives it.

    Raises:
        ValueError: NaN or infinite pixels.
    """
    sides_BHW = unchecked_patch_sides(pixels, thresholds, patch_size, scorer, merge)
    if (bad := (sides_BHW < 0).flatten(1).any(1)).any():
        raise ValueError(f"images {bad.nonzero().flatten().tolist()} of the batch have NaN or infinite pixels")
    return sides_BHW


@torch.no_grad()
def unchecked_patch_sides(
    pixels: Tensor, thresholds: Mapping[int, float], patch_size: int, scorer: str = "entropy", merge: str = "apt"
) -> Tensor:
    """Side of the patch that covers each base cell; never waits for the device.

    Args:
        pixels: float (B, 3, H, W), RGB in 0..255 before normalisation.
        thresholds: size in pixels -> threshold; empty for no merging.
        patch_size: side of the base patch in pixels.
        scorer, merge: as in ``AptClipVisionConfig``. With "random" as many cells are kept as there would be patches.

    Returns:
        int64 (B, H / patch_size, W / patch_size), pixels; 0 where "random" drops a cell, -1 everywhere in an image
        with NaN or infinite pixels, which ``PatchLayout.build`` refuses.
    """
    batch, _, *image_size = pixels.shape
    if not thresholds:
        return torch.full((batch, *(side // patch_size for side in image_size)), patch_size, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        # Resizing ends in uint8: rounding gives those very pixels back, whatever the normalisation's float error.
        scores = score_patches(pixels.float().round(), tuple(thresholds), scorer)
    sides_BHW = select_patches(scores, thresholds, patch_size, image_size)
    return drop_at_random(sides_BHW, patch_size) if merge == "random" else sides_BHW


def denormalise(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (B, 3, H, W) back to RGB in 0..1, float32."""
    mean, std = (_per_channel(tuple(values), pixel_values.device) for values in (mean, std))
    return pixel_values.float() * std + mean


# Making a tensor of Python numbers waits for a GPU. What is kept must be usable in training, even if the first to ask
# for it was in inference mode.
@lru_cache
@torch.inference_mode(False)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1)


def count_tokens(sides_HW: Tensor, patch_size: int) -> int:
    """Number of patches of one image: a patch of n cells counts n times 1 / n; dropped cells count nothing."""
    sides_HW = sides_HW[sides_HW > 0]
    return round(float((patch_size / sides_HW).square().sum()))
