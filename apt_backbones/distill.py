"""Distilling a ``LearnedScorer`` from what a frozen network makes of unlabelled images.

A small network learns to predict from the pixels what every patch loses by merging (``merging_losses.py``).

Legend: N, B images.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint import read_file
from .files import write_atomically
from .images import read_rgb
from .learned import LearnedScorer, ScorerTail, fold, folded_tensors, in_fixed_point
from .merging_losses import Losses

FLOOR = 0.01  # of the mean loss: below it differences are noise
RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.1, 1e-2
MAX_NORM = 1.0  # of gradients: a few patches that lose far more than was predicted would undo what was learned
WIDTH = 48  # of a scorer
_SHARD = 32


class Views(NamedTuple):
    """Images of one size and what merging loses in them.

    Attributes:
        pixels: uint8 (N, 3, height, width).
        losses: size -> float32 (N, height // size, width // size).
    """

    pixels: Tensor
    losses: dict[int, Tensor]


class ViewSettings(NamedTuple):
    """How views are cut from images.

    Attributes:
        size: height and width of every view in pixels.
        scales: least and largest zoom of an image; a view that it does not fill repeats its edge.
        copies: views of an image.
        seed: of zooms and places.
    """

    size: tuple[int, int]
    scales: tuple[float, float] = (0.7, 1.4)
    copies: int = 2
    seed: int = 0


class Epoch(NamedTuple):
    """What is reported after an epoch.

    Attributes:
        epoch: from 1.
        train, held_out: mean of the loss that is trained, a negative logarithmic likelihood.
        correlation: of the logarithms of predicted and true losses of the held-out patches, the smallest size's.
        avoided: if half of the held-out patches are merged by their scores, how much of the loss is avoided, where 0
            is a random choice and 1 the best one.
    """

    epoch: int
    train: float
    held_out: float
    correlation: float
    avoided: float


def cut_view(image: Image.Image, settings: ViewSettings, chance: random.Random) -> Tensor:
    """A random view of an image, uint8 (3, *settings.size)."""
    zoom = math.exp(chance.uniform(*map(math.log, settings.scales)))
    width, height = (max(1, round(side * zoom)) for side in image.size)
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    missing = [max(0, view - side) for view, side in zip(settings.size, (height, width))]
    pixels = F.pad(pixels[None].float(), (0, missing[1], 0, missing[0]), mode="replicate")[0].byte()
    top, left = (chance.randint(0, side - view) for side, view in zip(pixels.shape[1:], settings.size))
    return pixels[:, top : top + settings.size[0], left : left + settings.size[1]]


def make_views(
    paths: Sequence[Path],
    losses: Losses,
    sizes: Sequence[int],
    settings: ViewSettings,
    folder: Path,
    prepare: Callable[[Image.Image], Image.Image] = lambda image: image,
    batch: int = 4,
    report: Callable[[Iterable], Iterable] = iter,
) -> Views:
    """Cut views from image files and compute what merging loses in them.

    Args:
        paths: the files.
        losses: what merging loses: ``cell_losses`` or ``image_losses``.
        sizes: patch sides in pixels, the same as of ``losses``.
        settings: how they are cut. Their size should hold whole largest patches.
        folder: what is finished is kept here and not made again.
        prepare: an image as its file has it -> as large as the model sees it.
        batch: views that go through ``losses`` at a time.
        report: wraps what is gone through, for a progress bar.
    """
    jobs = [(path, copy) for copy in range(settings.copies) for path in paths]
    parts = []
    for start in report(range(0, len(jobs), _SHARD)):
        file = folder / f"views_{start}.safetensors"
        if not file.is_file():
            views = [
                cut_view(prepare(read_rgb(path)), settings, random.Random(f"{settings.seed} {path.name} {copy}"))
                for path, copy in jobs[start : start + _SHARD]
            ]
            found = zip(*(losses(pixels.float()) for pixels in torch.stack(views).split(batch)))
            merged = {str(size): torch.cat(part).cpu() for size, part in zip(sizes, found)}
            save_tensors(file, {"pixels": torch.stack(views), **merged})
        parts.append(load_file(file))
    return Views(
        torch.cat([part["pixels"] for part in parts]),
        {size: torch.cat([part[str(size)] for part in parts]) for size in sizes},
    )


def train_scorer(
    views: Sequence[Views],
    held_out: Sequence[Views],
    projection: nn.Conv2d,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    epochs: int = 40,
    batch: int = 16,
    width: int = WIDTH,
    seed: int = 0,
    state: Path | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[LearnedScorer, list[Epoch]]:
    """Train a scorer; the weights of the epoch with the least held-out loss are taken.

    Args:
        views, held_out: images, each with the same sizes of patches.
        projection: the network's patch projection, which stays as it is.
        pixel_mean, pixel_std: of its normalization, in 0..255.
        epochs, batch: passes over the views, and views of a step.
        width: see ``ScorerTail``.
        seed: of initial weights, order and mirroring.
        state: file that is kept up to date, from which an interrupted training goes on.
        report: called after each epoch.

    Returns:
        The scorer, and the curve.
    """
    torch.manual_seed(seed)
    device, sizes = projection.weight.device, tuple(views[0].losses)
    net = _Student(projection, pixel_mean, pixel_std, width, len(sizes)).to(device)
    net.standardize(views)
    scale = {size: _mean_loss(views, size) for size in sizes}
    optimizer = torch.optim.AdamW(net.trained(), RATE, weight_decay=WEIGHT_DECAY)
    curve, best = [], None
    if state is not None and state.is_file():
        kept = read_file(state)
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
        curve, best = [Epoch(*line) for line in kept["curve"]], kept["best"]
    steps = [math.ceil(len(group.pixels) / batch) for group in views]
    for epoch in range(len(curve), epochs):
        generator = torch.Generator().manual_seed(seed + 1000 * epoch)
        total, done = 0.0, 0
        for group, index in _batches(views, batch, generator):
            for settings in optimizer.param_groups:
                settings["lr"] = RATE * _schedule((epoch + done / sum(steps)) / epochs)
            mirrored = bool(torch.rand((), generator=generator) < 0.5)
            pixels, losses = _part(group, index, mirrored, device)
            loss = net.loss(_jittered(pixels, generator), losses, scale)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.trained(), MAX_NORM)
            optimizer.step()
            total, done = total + float(loss.detach()), done + 1
        curve.append(Epoch(epoch + 1, total / done, *_measure(net, held_out, scale, batch, device)))
        if best is None or curve[-1].held_out <= min(line.held_out for line in curve):
            best = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if state is not None:
            kept = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
            content = {**kept, "curve": [tuple(line) for line in curve]}
            write_atomically(state, lambda unfinished: torch.save(content, unfinished))  # noqa: B023
        report(curve[-1])
    net.load_state_dict(best)
    return net.folded(scale, _some(max(views, key=lambda group: len(group.pixels)), 64)), curve


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file as a whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda unfinished: save_file(tensors, unfinished))


class _Student(nn.Module):
    """The scorer in training: E and its standardization are apart from what is trained."""

    def __init__(self, projection: nn.Conv2d, pixel_mean, pixel_std, width: int, num_sizes: int):
        super().__init__()
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        channels = projection.out_channels
        self.projection = [projection]  # in a list: it is no part of this module's weights
        identity = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            identity.weight.copy_(torch.eye(channels)[:, :, None, None])
            identity.bias.zero_()
        unit = torch.zeros(channels), torch.ones(channels)
        whole = fold(projection, self.pixel_mean, self.pixel_std, *unit, identity)
        self.register_buffer("weight", whole.weight.detach())
        self.register_buffer("bias", whole.bias.detach())
        self.register_buffer("center", unit[0])
        self.register_buffer("spread", unit[1])
        self.first = nn.Conv2d(channels, width, 1)
        self.tail = ScorerTail(width, num_sizes)

    def trained(self) -> list[nn.Parameter]:
        return [*self.first.parameters(), *self.tail.parameters()]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        # As one convolution, as it is used: this has a tenth of the arithmetic.
        first = (self.first.weight, self.first.bias)
        weight, bias = folded_tensors(self.weight, self.bias, self.center, self.spread, *first)
        return self.tail(F.conv2d(pixels.float(), weight, bias, stride=weight.shape[2]))

    @torch.no_grad()
    def standardize(self, views: Sequence[Views]) -> None:
        """Take mean and spread of E's channels from some of the views."""
        parts = []
        for group in views:
            for part in _some(group, 128 // len(views)).split(16):
                pixels = part.to(self.weight.device).float()
                embedded = F.conv2d(pixels, self.weight, self.bias, stride=self.weight.shape[2])
                parts.append(embedded.transpose(0, 1).flatten(1))
        cells = torch.cat(parts, 1)
        self.center.copy_(cells.mean(1))
        self.spread.copy_(cells.std(1).clamp(min=1e-6))

    def loss(self, pixels: Tensor, losses: dict[int, Tensor], scale: dict[int, float]) -> Tensor:
        """Negative logarithmic likelihood of exponentially distributed losses, whose mean is predicted."""
        terms = []
        for (size, true), log in zip(losses.items(), self(pixels)):
            terms.append(((true / scale[size] + FLOOR) * (-log).exp() + log).mean())
        return sum(terms) / len(terms)

    def folded(self, scale: dict[int, float], pixels: Tensor) -> LearnedScorer:
        """What is used; ``pixels`` are of some images (``in_fixed_point``)."""
        stem = fold(self.projection[0], self.pixel_mean, self.pixel_std, self.center, self.spread, self.first)
        with torch.no_grad():
            for level, mean in zip(self.tail.levels, scale.values()):
                level["out"].bias.add_(math.log(mean))
        return in_fixed_point(stem, self.tail, pixels)


def _some(views: Views, most: int) -> Tensor:
    """The pixels of so many views at most, from everywhere."""
    return views.pixels[:: max(1, -(-len(views.pixels) // most))]


def _schedule(progress: float) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return 0.04 + 0.96 * progress / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def _mean_loss(views: Sequence[Views], size: int) -> float:
    mean = torch.cat([group.losses[size].flatten() for group in views]).double().mean()
    if not mean > 0:
        raise ValueError(
            "the outputs are the same within every patch (or not finite): there is nothing to learn; use other images"
        )
    return float(mean)


def _batches(views: Sequence[Views], batch: int, generator: torch.Generator) -> list[tuple[Views, Tensor]]:
    """All views once, in random order; a batch is of one group."""
    batches = []
    for group in views:
        batches += [(group, index) for index in torch.randperm(len(group.pixels), generator=generator).split(batch)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator)]


def _part(
    group: Views, index: Tensor | slice, mirrored: bool, device: torch.device
) -> tuple[Tensor, dict[int, Tensor]]:
    pixels = group.pixels[index].to(device)
    losses = {size: losses[index].to(device) for size, losses in group.losses.items()}
    if mirrored:
        # Only what holds whole patches of every size mirrors onto the same grid.
        inside = pixels.shape[3] // max(losses) * max(losses)
        pixels = pixels[..., :inside].flip(3)
        losses = {size: part[..., : inside // size].flip(2) for size, part in losses.items()}
    return pixels, losses


def _jittered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and brightness of every image changed by up to a fifth, and of its colours by up to a tenth."""
    contrast, light = (torch.rand(2, len(pixels), 1, 1, 1, generator=generator) * 0.4 - 0.2).to(pixels.device)
    colors = (torch.rand(len(pixels), 3, 1, 1, generator=generator) * 0.2 - 0.1).to(pixels.device)
    middle = pixels.float().mean((1, 2, 3), keepdim=True)
    return ((pixels - middle) * (1 + contrast) + middle * (1 + light) * (1 + colors)).clamp(0, 255)


@torch.no_grad()
def _measure(
    net: _Student, views: Sequence[Views], scale: dict[int, float], batch: int, device: torch.device
) -> tuple[float, float, float]:
    """Held-out loss, correlation, and avoided share, as ``Epoch`` has them."""
    total, count, logs, true = 0.0, 0, [], []
    size = next(iter(scale))
    for group in views:
        for start in range(0, len(group.pixels), batch):
            pixels, losses = _part(group, slice(start, start + batch), False, device)
            total, count = total + float(net.loss(pixels, losses, scale)) * len(pixels), count + len(pixels)
            logs.append(net(pixels)[0].flatten())
            true.append(losses[size].flatten() / scale[size])
    log, true = torch.cat(logs), torch.cat(true)
    correlation = float(torch.corrcoef(torch.stack([log, (true + FLOOR).log()]))[0, 1])
    half = len(true) // 2
    chosen, best = true[log.argsort()[:half]].mean(), true.sort().values[:half].mean()
    return total / count, correlation, float((true.mean() - chosen) / (true.mean() - best))
