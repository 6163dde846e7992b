"""Images to patch sides: the selection that every host shares (APT, arXiv 2510.18091, section 3).

Legend: B images, H x W base cells.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .layout import PatchLayout
from .learned import LearnedScorer
from .scores import DROPPED, check_thresholds, score_patches, select_patches

MERGE_MODES = ("apt", "apt_random_init", "apt_residual", "resizing", "random")
PADDING_MODES = ("coarsest", "drop")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """The value of an option; raise ValueError unless it is one of its choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    return value


def clean_thresholds(thresholds: Mapping[int | str, float] | None, patch_size: int) -> dict[int, float]:
    """Thresholds by size in pixels, ascending; None is none. Configurations written as JSON have strings as keys.

    Raises:
        ValueError: not a mapping of sizes to numbers, or sizes that do not double from the base patch.
    """
    try:
        thresholds = {int(size): float(threshold) for size, threshold in dict(thresholds or {}).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"thresholds must map sizes in pixels to numbers, such as {{{2 * patch_size}: 5.5}}; got {thresholds!r}"
        ) from error
    return check_thresholds(thresholds, patch_size)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB in 0..255 (B, 3, H, W) to normalized float32 images; mean and std per channel, in 0..255."""
    mean, std = (_per_channel(tuple(values), pixels.device) for values in (mean, std))
    return (pixels.float() - mean) / std


def undo_normalization(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized images (B, 3, H, W) back to RGB in 0..255, float32, rounded.

    Data pipelines resize in uint8: rounding gives those very pixels back, so that a selection depends on neither the
    float error of the normalization nor the device.

    Args:
        mean, std: per channel, in 0..255.
    """
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images.float() * std + mean).round_()


@torch.no_grad()
def patch_sides(
    pixels: Tensor, thresholds: Mapping[int, float], patch_size: int, scorer: str | LearnedScorer = "entropy"
) -> Tensor:
    """Side of the patch that covers each base cell; without host-device synchronization.

    Args:
        pixels: float (B, 3, H, W), RGB in 0..255, rounded; H and W of any size.
        thresholds: size in pixels -> threshold in the scorer's units; empty for no merging.
        patch_size: side of the base patch in pixels.
        scorer: see ``score_patches``.

    Returns:
        int64 (B, ceil(H / patch_size), ceil(W / patch_size)), pixels; -1 everywhere in an image with NaN or infinite
        pixels, which ``PatchLayout.build`` refuses.
    """
    if not thresholds:
        grid = (-(-side // patch_size) for side in pixels.shape[2:])
        return torch.full((len(pixels), *grid), patch_size, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        scores = score_patches(pixels.float(), tuple(thresholds), scorer)
    return select_patches(scores, thresholds, patch_size, pixels.shape[2:])


def layout_of(
    sides_BHW: Tensor,
    thresholds: Mapping[int, float],
    patch_size: int,
    merge: str = "apt",
    window: int | None = None,
    num_prefix: int = 0,
) -> PatchLayout:
    """The layout of a selection made with these thresholds (``patch_sides``), for "random" after ``drop_at_random``."""
    is_random = merge == "random" and bool(thresholds)
    sizes = () if is_random else tuple(thresholds)
    return PatchLayout.build(sides_BHW, patch_size, sizes, window, num_prefix, fill_dropped=is_random)


def drop_padding(sides_BHW: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Give no token to patches that lie wholly inside padding.

    Data pipelines pad after normalization with exact zeros, which no normalized pixel equals, so padding shows in the
    batch itself. A patch that holds any content is kept whole, and so is the first cell of an image.

    Args:
        sides_BHW: a selection, as ``select_patches`` gives.
        images: normalized images (B, 3, H * patch_size, W * patch_size).
        patch_size: side of the base patch in pixels.

    Returns:
        sides_BHW with ``DROPPED`` in the cells of such patches.
    """
    height, width = sides_BHW.shape[1:]
    pixels = (images != 0).any(1).unflatten(1, (height, patch_size)).unflatten(3, (width, patch_size))
    has_content_BHW = pixels.any(4).any(2)
    has_content_BHW[:, 0, 0] = True
    factor_BHW = sides_BHW.clamp(min=patch_size) // patch_size
    row_H1 = torch.arange(height, device=images.device)[:, None]
    column_W = torch.arange(width, device=images.device)
    head_BHW = (row_H1 - row_H1 % factor_BHW) * width + column_W - column_W % factor_BHW  # cell that heads the patch
    head_BN, has_content_BN = head_BHW.flatten(1), has_content_BHW.flatten(1)
    num_content_BN = torch.zeros_like(head_BN).scatter_add_(1, head_BN, has_content_BN.long())
    return sides_BHW.where(num_content_BN.gather(1, head_BN).view_as(sides_BHW) > 0, DROPPED)


def drop_at_random(sides_BHW: Tensor, patch_size: int) -> Tensor:
    """The paper's random baseline: per image as many base patches as the selection has patches, the rest dropped.

    Which cells go first is a fixed random order per grid shape, so that a result does not depend on the batch, the
    device or the state of a generator. Build the layout with ``fill_dropped=True``.

    Args:
        sides_BHW: a selection, as ``select_patches`` gives.
        patch_size: side of the base patch in pixels.

    Returns:
        sides_BHW with ``patch_size`` where a cell is kept and ``DROPPED`` elsewhere; what was dropped stays so.
    """
    height, width = sides_BHW.shape[1:]
    num_patches_B = (patch_size / sides_BHW).square().where(sides_BHW > 0, 0).sum((1, 2))  # of powers of four: exact
    order_HW = _drop_order(height, width, sides_BHW.device)
    order_BN = order_HW.where(sides_BHW != DROPPED, height * width).flatten(1)
    rank_BHW = order_BN.argsort(1).argsort(1).view_as(sides_BHW)
    is_kept_BHW = (rank_BHW < num_patches_B[:, None, None]) | (sides_BHW < 0)
    return sides_BHW.clamp(max=patch_size).where(is_kept_BHW, DROPPED)


# What is kept must be usable in training, even if the first to ask for it was in inference mode.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _drop_order(height: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(height * width, generator=generator).view(height, width).to(device)
