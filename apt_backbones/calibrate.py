"""Thresholds that meet a token budget on a given set of images."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .learned import LearnedScorer
from .scores import score_patches, select_patches

ScoreMaps = Mapping[int, Tensor]


def score_maps_of(image: Tensor, sizes: Sequence[int], scorer: str | LearnedScorer = "entropy") -> dict[int, Tensor]:
    """Scores of one image (1, 3, H, W) for the merged sizes, and its base grid, for the functions below."""
    patch_size = sizes[0] // 2
    grid = [-(-side // patch_size) for side in image.shape[2:]]
    return {patch_size: torch.zeros(1, *grid), **score_patches(image, sizes, scorer)}


def kept_shares(score_maps: Sequence[ScoreMaps], thresholds: Mapping[int, float], patch_size: int) -> Tensor:
    """Tokens / base cells of every image under some thresholds: float64 (number of images,).

    Args:
        score_maps: per image what ``score_maps_of`` gives for it alone.
        thresholds: size -> threshold.
        patch_size: side of the base patch in pixels.
    """
    shares = []
    for scores in score_maps:
        height, width = scores[patch_size].shape[1:]
        sides = select_patches(scores, thresholds, patch_size, (height * patch_size, width * patch_size))
        shares.append((patch_size / sides.double()).square().mean())
    return torch.stack(shares)


def share_curves(
    score_maps: Sequence[ScoreMaps], patch_size: int, steps: Sequence[float], ratios: Sequence[float] | None = None
) -> Tensor:
    """Tokens / base cells of every image as the smallest size's threshold takes each of some values.

    Args:
        score_maps, patch_size: as for ``kept_shares``.
        steps: thresholds of the smallest size.
        ratios: threshold of each size relative to that of the smallest; 1 for every size if not given.

    Returns:
        float64 (number of steps, number of images).
    """
    ratios = _check_ratios(score_maps, patch_size, ratios)
    steps, shares = torch.tensor(steps, dtype=torch.float64), []
    for scores in score_maps:
        events, saved = _in_order(*_merges(scores, patch_size, ratios))
        saved = torch.cat([saved.new_zeros(1), saved])
        shares.append(1 - saved[torch.searchsorted(events, steps)] / scores[patch_size].numel())
    return torch.stack(shares, dim=1)


def calibrate_thresholds(
    score_maps: Sequence[ScoreMaps], patch_size: int, keep: float, ratios: Sequence[float] | None = None
) -> dict[int, float]:
    """Thresholds under which the images keep a share of their tokens, averaged over all cells of all images.

    Args:
        score_maps: as for ``kept_shares``. Score images before they are padded: padding is no content.
        patch_size: side of the base patch in pixels.
        keep: share of the base cells to keep as tokens, e.g. 0.7.
        ratios: threshold of each size relative to that of the smallest; 1 for every size if not given. A size whose
            ratio is 0 is not used.

    Returns:
        size -> threshold, to 5 significant digits. The share they give is the closest from below that these images
        allow: scores are discrete, so a budget is met up to one patch.

    Raises:
        ValueError: the budget is no share, or cannot be met even if every patch is merged.
    """
    ratios = _check_ratios(score_maps, patch_size, ratios)
    if not 0 < keep <= 1:
        raise ValueError(f"the share of tokens to keep must be above 0 and at most 1, got {keep}")
    cells = sum(scores[patch_size].numel() for scores in score_maps)
    per_image = [_merges(scores, patch_size, ratios) for scores in score_maps]
    events, saved = _in_order(*(torch.cat(part) for part in zip(*per_image)))
    to_save = (1 - keep) * cells - 1e-6
    if to_save <= 0:
        return dict.fromkeys(ratios, 0.0)
    most = float(saved[-1]) if len(saved) else 0.0
    if most < to_save:
        raise ValueError(
            f"{keep:.0%} of the tokens cannot be met: {1 - most / cells:.1%} remain when every patch is merged; "
            "allow larger patches"
        )
    last = float(events[int((saved >= to_save).nonzero()[0])])
    return {size: _just_above(last * ratio) if ratio else 0.0 for size, ratio in ratios.items()}


def _check_ratios(score_maps: Sequence[ScoreMaps], patch_size: int, ratios: Sequence[float] | None) -> dict[int, float]:
    """Size -> ratio."""
    sizes = sorted(size for size in score_maps[0] if size != patch_size)
    ratios = [1.0] * len(sizes) if ratios is None else list(ratios)
    if len(ratios) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes {sizes} need as many ratios, got {ratios}")
    if min(ratios) < 0 or max(ratios) == 0:
        raise ValueError(f"ratios must be positive, or 0 for a size that is not used, got {ratios}")
    return dict(zip(sizes, ratios))


def _merges(scores: ScoreMaps, patch_size: int, ratios: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """What happens in one image as the threshold t of ratio 1 grows: values of t, and the tokens that each saves.

    A patch merges when t exceeds its score / ratio, and stops counting when a larger patch that covers it merges, at
    the least such value among those above it.
    """
    events, savings = [], []
    covered_at = None
    for size in sorted(ratios, reverse=True):
        merged_at = scores[size].double() / ratios[size] if ratios[size] else torch.full_like(scores[size], math.inf)
        if covered_at is None:
            covered_at = torch.full_like(merged_at, math.inf, dtype=torch.float64)
        else:
            rows, columns = merged_at.shape[1:]
            covered_at = F.interpolate(covered_at[None], scale_factor=2.0, mode="nearest")[0, :, :rows, :columns]
        counts = merged_at < covered_at
        tokens = (size // patch_size) ** 2 - 1.0
        for values, saved in ((covered_at[counts], -tokens), (merged_at[counts], tokens)):
            values = values[values.isfinite()]
            events.append(values)
            savings.append(torch.full_like(values, saved))
        covered_at = covered_at.minimum(merged_at)
    return torch.cat(events), torch.cat(savings)


def _in_order(events: Tensor, savings: Tensor) -> tuple[Tensor, Tensor]:
    """Events in ascending order and the tokens saved by all up to each. Savings do not fall with the threshold, so
    of equal events the losses come first."""
    order = savings.argsort()
    order = order[events[order].argsort(stable=True)]
    return events[order], savings[order].cumsum(0)


def _just_above(value: float) -> float:
    """The next larger number of 5 significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 4) if value > 0 else 1e-9
    return float(f"{(math.floor(value * (1 + 1e-9) / unit) + 1) * unit:.5g}")
