"""How much detail a patch holds, and which patch sizes an image therefore gets (APT, arXiv 2510.18091, section 3).

``score_patches`` gives every candidate patch of every size a score, ``select_patches`` turns the scores into the
side of the patch that covers each base cell. Both are pure tensor functions without loops over images or patches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .learned import SUFFIX, LearnedScorer, load_scorer

NUM_BINS = 512
DROPPED = 0  # side given to a base cell that gets no token
NOT_FINITE = -1  # side given to every cell of an image with NaN or infinite pixels; PatchLayout refuses it
_GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)


def score_patches(images: Tensor, sizes: Sequence[int], scorer: str | LearnedScorer = "entropy") -> dict[int, Tensor]:
    """Score all patches of the given sizes on a regular grid.

    Args:
        images: float tensor (B, 3, H, W), RGB in 0..255. Any H and W.
        sizes: patch sides in pixels, each twice the one before, e.g. (32, 64, 128); the base patch is half the first.
        scorer: ``"entropy"`` (bits per pixel of the grey values), ``"laplacian"`` (mean absolute 8-neighbour
            Laplacian of grey / 255), ``"upsample_mse"`` (mean squared error of RGB / 255 after bilinear down-
            and upsampling by size / base patch), or a learned scorer or its file (nats; ``LearnedScorer``).

    Returns:
        size -> float32 scores (B, ceil(H / size), ceil(W / size)). A patch that sticks out over the image's edge
        scores +inf; every patch of an image with NaN or infinite pixels scores NaN.

    Raises:
        TypeError: images are not floating point.
        ValueError: images are not (B, 3, H, W), sizes do not double, or the scorer is unknown or not for them.
    """
    check_images(images)
    sizes = check_sizes(sizes)
    scorer = find_scorer(scorer)
    images = images.detach().float()
    not_finite_B = ~images.sum((1, 2, 3)).isfinite()
    height, width = images.shape[2:]
    scores = {}
    for size, score in zip(sizes, scorer(images, sizes)):
        overhang = (0, -(-width // size) - score.shape[2], 0, -(-height // size) - score.shape[1])
        score = F.pad(score, overhang, value=math.inf) if any(overhang) else score
        scores[size] = score.masked_fill(not_finite_B[:, None, None], math.nan)
    return scores


def select_patches(
    scores: Mapping[int, Tensor], thresholds: Mapping[int, float], patch_size: int, image_size: tuple[int, int]
) -> Tensor:
    """Quadtree selection: a patch is kept whole if its score is below its size's threshold, the largest first.

    Args:
        scores: size -> (B, ceil(H / size), ceil(W / size)), as ``score_patches`` gives.
        thresholds: size -> threshold in the scorer's units. The comparison is strict, so with a scorer that is never
            negative a threshold <= 0 merges nothing; +inf merges every patch that lies inside the image.
        patch_size: side of the base patch in pixels.
        image_size: (H, W) in pixels.

    Returns:
        LongTensor (B, ceil(H / patch_size), ceil(W / patch_size)): side in pixels of the patch covering each base
        cell, or ``NOT_FINITE`` everywhere in an image whose scores are NaN.

    Raises:
        ValueError: thresholds for sizes that were not scored or do not double from the base patch, or NaN thresholds.
    """
    thresholds = check_thresholds(thresholds, patch_size)
    missing = sorted(set(thresholds) - set(scores))
    if missing:
        raise ValueError(f"thresholds name sizes {missing}, but only {sorted(scores)} were scored")
    height, width = (-(-side // patch_size) for side in image_size)
    some_score = next(iter(scores.values()))
    sides_BHW = some_score.new_full((some_score.shape[0], height, width), patch_size, dtype=torch.long)
    for size, threshold in thresholds.items():  # ascending, so the largest size that qualifies has the last word
        factor = size // patch_size
        merge_BHW = (scores[size] < threshold).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        sides_BHW = sides_BHW.masked_fill(merge_BHW[:, :height, :width], size)
    not_finite_B = some_score[:, :1, :1].isnan()
    return sides_BHW.masked_fill(not_finite_B, NOT_FINITE)


def find_scorer(scorer: str | LearnedScorer) -> Callable[[Tensor, Sequence[int]], list[Tensor]]:
    """The scorer of a name or a file; a learned scorer is returned as it is.

    Raises:
        FileNotFoundError, ValueError: there is no such scorer or file, or the file holds none.
    """
    if isinstance(scorer, LearnedScorer):
        return scorer
    if scorer in SCORERS:
        return SCORERS[scorer]
    if str(scorer).endswith(SUFFIX):
        return load_scorer(scorer)
    raise ValueError(f"unknown scorer {scorer!r}; choose one of {', '.join(SCORERS)}, or a {SUFFIX} file")


def check_scorer(scorer: str | LearnedScorer, sizes: Sequence[int] = ()) -> None:
    """Raise as ``find_scorer``, and ValueError for a learned scorer that is not for these patch sizes."""
    if isinstance(scorer := find_scorer(scorer), LearnedScorer):
        scorer.check_sizes(sizes)


def check_images(images: Tensor) -> None:
    """Raise unless images are a non-empty float batch (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be RGB batches (B, 3, H, W), got shape {tuple(images.shape)}; "
            "convert grey or RGBA images to RGB first"
        )
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in 0..255, got {images.dtype}; call .float() on them")
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")


def check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as a tuple; raise unless they are even positive integers, each twice the one before."""
    sizes = tuple(sizes)
    doubling = all(larger == 2 * smaller for smaller, larger in pairwise(sizes))
    if not sizes or not doubling or sizes[0] < 2 or sizes[0] % 2:
        raise ValueError(f"patch sizes must be even and double from one to the next, e.g. (32, 64, 128); got {sizes}")
    return sizes


def check_thresholds(thresholds: Mapping[int, float], patch_size: int) -> dict[int, float]:
    """Thresholds in ascending size; raise unless the sizes double from the base patch and no threshold is NaN."""
    sizes = sorted(thresholds)
    expected = [patch_size << (level + 1) for level in range(len(sizes))]
    if sizes != expected:
        raise ValueError(
            f"thresholds are given for sizes {sizes}, but with base patch {patch_size} the sizes must be {expected}"
        )
    if any(math.isnan(threshold) for threshold in thresholds.values()):
        raise ValueError(f"thresholds must be numbers, got {dict(thresholds)}")
    return {size: float(thresholds[size]) for size in sizes}


def _grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255 -> grey (B, H, W). Products and sums stay separate operations: fused multiply-adds
    round differently, and a grey value at a bin's edge would then depend on the device."""
    grey, channel = images[:, 0].clamp(0, 255).mul_(_GREY_WEIGHTS[0]), torch.empty_like(images[:, 0])
    for index in (1, 2):
        torch.clamp(images[:, index], 0, 255, out=channel)
        grey.add_(channel.mul_(_GREY_WEIGHTS[index]))
    return grey


def _entropy(images: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Histograms of the smallest size from one pass over the pixels; each larger size sums 2x2 histograms."""
    counts = _histograms(images, sizes[0])
    scores = []
    for size in sizes:
        # log2(n) - sum(c log2 c) / n in float64, rounded once: the same float32 on every device, and exact
        # where the histogram is (four equally frequent grey values give exactly 2 bits).
        area = size * size
        entropy = math.log2(area) - _count_log_count(area, images.device)[counts].sum(-1) / area
        scores.append(entropy.clamp_(min=0).float())
        rows, columns = counts.shape[1] // 2, counts.shape[2] // 2
        counts = counts[:, : rows * 2, : columns * 2].unflatten(1, (rows, 2)).unflatten(3, (columns, 2)).sum((2, 4))
    return scores


# What is kept must be usable in training, even if the first to ask for it was in inference mode.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _count_log_count(area: int, device: torch.device) -> Tensor:
    """c log2 c of every count that a patch of that many pixels can have (area + 1,), float64."""
    count = torch.arange(area + 1, device=device, dtype=torch.float64)
    return torch.special.xlogy(count, count).div_(math.log(2))


def _histograms(images: Tensor, size: int) -> Tensor:
    """Counts of grey values per patch that lies inside: (B, H // size, W // size, NUM_BINS)."""
    batch, rows, columns = images.shape[0], images.shape[2] // size, images.shape[3] // size
    grey = _grey(images[:, :, : rows * size, : columns * size])
    # NaN pixels are reported by the caller; here they must only not index outside the histogram.
    bins = grey.mul_(NUM_BINS / 256).nan_to_num_(0).to(torch.int64)
    patch = torch.arange(batch * rows * columns, device=images.device).view(batch, rows, 1, columns, 1)
    bins.view(batch, rows, size, columns, size).add_(patch * NUM_BINS)
    bins, num_bins = bins.flatten(), batch * rows * columns * NUM_BINS
    if bins.device.type == "cpu":
        counts = torch.bincount(bins, minlength=num_bins)
    else:  # bincount waits for the largest value on a GPU
        one = torch.ones((), dtype=torch.int64, device=bins.device)
        counts = torch.zeros(num_bins, dtype=torch.int64, device=bins.device).scatter_add_(0, bins, one.expand_as(bins))
    return counts.view(batch, rows, columns, NUM_BINS)


def _laplacian(images: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    grey = _grey(images).div_(255)[:, None]
    mode = "reflect" if min(images.shape[2:]) > 1 else "replicate"  # a single row has nothing to reflect
    neighbourhood = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode=mode), kernel_size=3, stride=1)
    # 8 x - (sum of the 8 neighbours) = 9 (x - mean of the 3 x 3)
    detail = grey.sub_(neighbourhood).mul_(9).abs_()[:, 0]
    return _patch_means(detail, sizes)


def _upsample_mse(images: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    scores = []
    for size in sizes:
        if min(images.shape[2:]) < size:  # no patch of this size lies inside
            scores.append(images.new_zeros(images.shape[0], images.shape[2] // size, images.shape[3] // size))
            continue
        error = torch.zeros_like(images[:, 0])
        for channel in images.split(1, dim=1):  # one at a time keeps the scratch small
            small = F.interpolate(channel, scale_factor=sizes[0] / (2 * size), mode="bilinear", align_corners=False)
            restored = F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)
            error.add_(restored.sub_(channel).div_(255).square_()[:, 0], alpha=1 / 3)
        scores.extend(_patch_means(error, (size,)))
    return scores


def _patch_means(detail: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """(B, H, W) -> mean over each patch that lies inside, per size (B, H // size, W // size)."""
    means = []
    for size in sizes:
        rows, columns = detail.shape[1] // size, detail.shape[2] // size
        inside = detail[:, : rows * size, : columns * size]
        means.append(inside.unflatten(1, (rows, size)).unflatten(3, (columns, size)).mean((2, 4)))
    return means


SCORERS = {"entropy": _entropy, "laplacian": _laplacian, "upsample_mse": _upsample_mse}
