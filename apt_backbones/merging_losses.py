"""What merging a patch loses, by what a frozen network makes of an image: what a ``LearnedScorer`` learns.

Of an output with a value per cell (``cell_losses``) it is how much that differs within the patch: the cells of a merged
patch all get one output. Where merged patches are read at their own resolution (``smaller_image_losses``) it is how far
what is said of a smaller image, of which the patch is one cell, is from what is said of the whole one. Of an output of
the whole image (``image_losses``) it is how much that changes if the patch's tokens become their mean.

Legend: B images, C channels of the output, H x W base cells, T tokens, D their channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .distance import merging_off
from .trunk import AdaptiveTrunk

OUTPUTS = ("probabilities", "features")
LEAST = 1e-6  # added to probabilities before their logarithm is taken

# Float images (B, 3, height, width) in 0..255 to float32 losses (B, height // size, width // size) per size.
Losses = Callable[[Tensor], list[Tensor]]


def cell_losses(outputs: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> Losses:
    """``merging_losses`` of an output with a value per cell.

    Args:
        outputs: float images (B, 3, height, width) in 0..255 to probabilities (B, C, ...) of any resolution.
        sizes: patch sides in pixels, each twice the one before; the base patch is half the first.
    """
    p = sizes[0] // 2

    @torch.no_grad()
    def losses(pixels: Tensor) -> list[Tensor]:
        grid = [side // p for side in pixels.shape[2:]]
        cells = F.adaptive_avg_pool2d(outputs(pixels).float(), grid)
        return merging_losses(cells, [size // p for size in sizes])

    return losses


def smaller_image_losses(outputs: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> Losses:
    """How far what is said of a smaller image is from what is said of the image: the mean over the patch of their
    Kullback-Leibler divergence in nats.

    Args:
        outputs: float images (B, 3, height, width) in 0..255 to probabilities (B, C, height, width).
        sizes: patch sides in pixels, each twice the one before; the base patch is half the first. Of the smaller image
            a patch is one base cell.
    """
    p = sizes[0] // 2

    @torch.no_grad()
    def losses(pixels: Tensor) -> list[Tensor]:
        whole_BCHW = outputs(pixels).float()
        log_BCHW, found = (whole_BCHW + LEAST).log(), []
        for size in sizes:
            smaller_BCHW = outputs(F.avg_pool2d(pixels, size // p)).float()
            smaller_BCHW = F.interpolate(smaller_BCHW, whole_BCHW.shape[2:], mode="bilinear")
            ratio_BCHW = log_BCHW - (smaller_BCHW + LEAST).log()
            divergence_B1HW = (whole_BCHW * ratio_BCHW).sum(1, keepdim=True).clamp(min=0)
            found.append(F.avg_pool2d(divergence_B1HW, size)[:, 0])
        return found

    return losses


def image_losses(
    trunk: AdaptiveTrunk,
    outputs: Callable[[Tensor], Tensor],
    sizes: Sequence[int],
    kind: str = "features",
    draws: int = 2,
) -> Losses:
    """How much an output of the whole image changes, to first order, if a patch's embedded tokens become their mean.

    Args:
        trunk: whose tokens they are; it merges nothing meanwhile.
        outputs: float images (B, 3, height, width) in 0..255 to (B, C), differentiable, by a model with this trunk.
        sizes: patch sides in pixels.
        kind: "features" (squared change) or "probabilities" (twice the Kullback-Leibler divergence).
        draws: random projections of the output, each of which costs a backward pass. An expectation over them is what
            is described, and a scorer learns expectations.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in OUTPUTS:
        raise ValueError(f"unknown kind of output {kind!r}; choose one of {', '.join(OUTPUTS)}")
    factors = [size // trunk.patch_size for size in sizes]

    def losses(pixels: Tensor) -> list[Tensor]:
        with torch.enable_grad(), _embedded_tokens(trunk, sizes) as tokens:
            output_BC = outputs(pixels).float()
        # Drawn by the images, so that it does not matter what was done before, or in an earlier run.
        generator = torch.Generator(output_BC.device).manual_seed(int(pixels.double().sum()))
        x_TD, layout, found = tokens[0], trunk.last_layout, [0.0] * len(sizes)
        map_BDHW, changes = layout.to_map(x_TD.detach().float()), []
        for factor in factors:
            mean_BDHW = F.avg_pool2d(map_BDHW, factor).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            changes.append(mean_BDHW - map_BDHW[..., : mean_BDHW.shape[2], : mean_BDHW.shape[3]])
        for draw in range(draws):
            if kind == "features":
                signs_BC = 2 * torch.randint(2, output_BC.shape, generator=generator, device=generator.device) - 1
                projected = (output_BC * signs_BC).sum()
            else:
                # The expected square of this gradient is Fisher's information, in which the divergence is quadratic.
                classes_B1 = output_BC.detach().multinomial(1, generator=generator)
                projected = output_BC.gather(1, classes_B1).log().sum()
            (slope_TD,) = torch.autograd.grad(projected, x_TD, retain_graph=draw + 1 < draws)
            slope_BDHW = layout.to_map(slope_TD.float())
            for number, (factor, change_BDHW) in enumerate(zip(factors, changes)):
                height, width = change_BDHW.shape[2:]
                change_B1HW = (slope_BDHW[..., :height, :width] * change_BDHW).sum(1, keepdim=True)
                found[number] = found[number] + (factor**2 * F.avg_pool2d(change_B1HW, factor)[:, 0]).square() / draws
        return found

    return losses


@contextmanager
def _embedded_tokens(trunk: AdaptiveTrunk, sizes: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list of what is embedded meanwhile (T, D), of patches of one size; leaves, of which gradients can be asked."""
    tokens = []

    def keep(module: torch.nn.Module, inputs: tuple, x_TD: Tensor) -> Tensor:
        tokens.append(x_TD.detach().requires_grad_())
        return tokens[-1]

    handle = trunk.adaptive_embed.register_forward_hook(keep)
    try:
        with merging_off(trunk):
            # With thresholds of 0 nothing merges either, but timm's networks run on packed tokens.
            trunk.thresholds = dict.fromkeys(sizes, 0.0)
            yield tokens
    finally:
        handle.remove()


def merging_losses(maps_BCHW: Tensor, factors: Sequence[int]) -> list[Tensor]:
    """What is lost if all cells of a patch get the mean output, their Jensen-Shannon divergence in nats: float32 (B,
    H // factor, W // factor) per factor.

    Args:
        maps_BCHW: probabilities on the base cells.
        factors: side of the patches in cells.
    """
    maps_BCHW, losses = maps_BCHW.float(), []
    entropy_B1HW = -torch.special.xlogy(maps_BCHW, maps_BCHW).sum(1, keepdim=True)
    for factor in factors:
        mean_BCHW, mean_entropy_B1HW = F.avg_pool2d(maps_BCHW, factor), F.avg_pool2d(entropy_B1HW, factor)
        entropy_of_mean_BHW = -torch.special.xlogy(mean_BCHW, mean_BCHW).sum(1)
        losses.append((entropy_of_mean_BHW - mean_entropy_B1HW[:, 0]).clamp(min=0))
    return losses


class Prototypes:
    """Probabilities of a network without a classifier: which of some clusters of its features a cell belongs to.

    Args:
        center, spread: mean and standard deviation of the features' channels (C,).
        prototypes: clusters' means of standardized features (K, C).
        temperature: of the softmax over negative squared distances.
    """

    def __init__(self, center: Tensor, spread: Tensor, prototypes: Tensor, temperature: float):
        self.center, self.spread = center[:, None, None], spread[:, None, None]
        self.prototypes, self.temperature = prototypes, temperature

    @classmethod
    def fit(cls, maps: Sequence[Tensor], count: int = 64, seed: int = 0) -> "Prototypes":
        """k-means of the cells of feature maps (B, C, H, W)."""
        cells = torch.cat([part.float().permute(0, 2, 3, 1).flatten(0, 2) for part in maps])
        center, spread = cells.mean(0), cells.std(0).clamp(min=1e-6)
        cells = (cells - center) / spread
        order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed)).to(cells.device)
        prototypes = cells[order[:count]]
        for _ in range(15):
            nearest = _nearness(cells, prototypes).argmax(1)
            sums = torch.zeros_like(prototypes).index_add_(0, nearest, cells)
            members = nearest.bincount(minlength=len(prototypes))[:, None]
            prototypes = torch.where(members > 0, sums / members.clamp(min=1), prototypes)
        best = _nearness(cells, prototypes).topk(2).values
        return cls(center, spread, prototypes, float((best[:, 0] - best[:, 1]).mean()) / 2)

    def __call__(self, maps_BCHW: Tensor) -> Tensor:
        """Probabilities (B, K, H, W)."""
        cells = ((maps_BCHW.float() - self.center) / self.spread).permute(0, 2, 3, 1)
        return (_nearness(cells, self.prototypes) / self.temperature).softmax(3).permute(0, 3, 1, 2)


def _nearness(cells: Tensor, prototypes: Tensor) -> Tensor:
    """Negative squared distances (..., K), up to what all prototypes share."""
    return 2 * cells @ prototypes.T - prototypes.square().sum(1)
