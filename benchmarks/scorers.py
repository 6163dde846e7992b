"""Patch scoring alone, beside patch entropy computed from one-hot vectors."""

import torch
from torch import Tensor

from apt_backbones import score_patches

from .cases import Case
from .clock import Laps, Parts
from .images import Batch

NUM_BINS = 512
SIZES = (32, 64, 128)


class Scorers:
    """``score_patches`` against ``one_hot_entropy`` on images of 0..255."""

    measures = {"scoring": None}

    def __init__(self, batches: list[Batch], device: torch.device):
        self.device, self.batches = device, [batch.to(device) for batch in batches]
        self.cases = [Case("one-hot", one_hot_entropy, is_reference=True), Case("score_patches", score_patches)]

    @torch.inference_mode()
    def step(self, case: Case, batch: Batch, lap: Laps) -> None:
        case.model(batch.square, SIZES)
        lap("scoring")

    def parts(self, case: Case) -> Parts:
        return {}

    @torch.inference_mode()
    def describe(self) -> None:
        """Raises AssertionError unless both compute the same."""
        theirs, ours = (case.model(self.batches[0].square, SIZES) for case in self.cases)
        for size in SIZES:
            torch.testing.assert_close(ours[size], theirs[size], rtol=0, atol=1e-3)


def one_hot_entropy(images: Tensor, sizes: tuple[int, ...]) -> dict[int, Tensor]:
    """Entropy from a one-hot vector per pixel, summed to a histogram per patch, for every size anew.

    Args:
        images: float (1, 3, H, W), RGB in 0..255; all sizes divide H and W.
        sizes: patch sides in pixels.

    Returns:
        size -> bits (1, H / size, W / size).
    """
    red, green, blue = images[0].clamp(0, 255)
    bins_HW = ((0.2989 * red + 0.5870 * green + 0.1140 * blue) * (NUM_BINS / 256)).long().clamp(max=NUM_BINS - 1)
    scores = {}
    for size in sizes:
        rows, columns = (side // size for side in bins_HW.shape)
        bins_NP = bins_HW.unflatten(0, (rows, size)).unflatten(2, (columns, size)).transpose(1, 2).reshape(-1, size**2)
        one_hot_NPB = torch.zeros(*bins_NP.shape, NUM_BINS, device=images.device)
        one_hot_NPB.scatter_(2, bins_NP[:, :, None], 1)
        share_NB = one_hot_NPB.sum(1) / size**2
        del one_hot_NPB
        scores[size] = -torch.xlogy(share_NB, share_NB).sum(1).div(torch.tensor(2.0).log()).view(1, rows, columns)
    return scores
