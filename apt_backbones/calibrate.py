"""Thresholds that meet a token budget on a given set of images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .scores import score_patches, select_patches


def kept_shares(score_maps: Sequence[Mapping[int, Tensor]], thresholds: Mapping[int, float], patch_size: int) -> Tensor:
    """Tokens / base cells of every image under some thresholds: float64 (number of images,).

    Args:
        score_maps: per image what ``score_patches`` gives for it alone, and under ``patch_size`` any map of its base
            grid's shape (1, H, W), as ``score_maps_of`` makes.
        thresholds: size -> threshold.
        patch_size: side of the base patch in pixels.
    """
    shares = []
    for scores in score_maps:
        height, width = scores[patch_size].shape[1:]
        sides = select_patches(scores, thresholds, patch_size, (height * patch_size, width * patch_size))
        shares.append((patch_size / sides.double()).square().mean())
    return torch.stack(shares)


def score_maps_of(image: Tensor, sizes: Sequence[int], scorer: str = "entropy") -> dict[int, Tensor]:
    """Scores of one image (1, 3, H, W) for the merged sizes, and its base grid, for ``kept_shares``."""
    patch_size = sizes[0] // 2
    grid = [-(-side // patch_size) for side in image.shape[2:]]
    return {patch_size: torch.zeros(1, *grid), **score_patches(image, sizes, scorer)}


def calibrate_thresholds(
    score_maps: Sequence[Mapping[int, Tensor]], patch_size: int, keep: float, ratios: Sequence[float] | None = None
) -> dict[int, float]:
    """Thresholds under which the images keep a share of their tokens, averaged over all cells of all images.

    Args:
        score_maps: as for ``kept_shares``. Score images before they are padded: padding is no content.
        patch_size: side of the base patch in pixels.
        keep: share of the base cells to keep as tokens, e.g. 0.7.
        ratios: threshold of each size relative to that of the smallest; 1 for every size if not given.

    Returns:
        size -> threshold, to 5 significant digits. The share they give is the closest from below that these images
        allow: scores are discrete, so a budget is met up to one patch.

    Raises:
        ValueError: the budget is no share, or cannot be met even if every patch is merged.
    """
    sizes = sorted(size for size in score_maps[0] if size != patch_size)
    ratios = [1.0] * len(sizes) if ratios is None else list(ratios)
    if len(ratios) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes {sizes} need as many ratios, got {ratios}")
    if not 0 < keep <= 1:
        raise ValueError(f"the share of tokens to keep must be above 0 and at most 1, got {keep}")
    cells = torch.tensor([scores[patch_size].numel() for scores in score_maps], dtype=torch.float64)

    def thresholds_at(threshold: float) -> dict[int, float]:
        return {size: float(f"{threshold * ratio:.5g}") for size, ratio in zip(sizes, ratios)}

    def share_at(threshold: float) -> float:
        return float((kept_shares(score_maps, thresholds_at(threshold), patch_size) * cells).sum() / cells.sum())

    finite = torch.cat([scores[size][scores[size].isfinite()] for scores in score_maps for size in sizes])
    low, high = 0.0, float(finite.max()) / min(ratios) + 1 if len(finite) else 1.0
    if share_at(high) > keep:
        raise ValueError(
            f"{keep:.0%} of the tokens cannot be met: {share_at(high):.1%} remain when every patch is merged; "
            "allow larger patches"
        )
    if share_at(low) <= keep:
        return thresholds_at(low)
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if share_at(middle) <= keep else (middle, high)
    return thresholds_at(high)
