"""A scorer with weights: how much a frozen network's output changes if a patch is merged, predicted from pixels.

``distill`` trains it without labels; a file holds it. Wherever the name of a pixel scorer is taken, so is the name of
such a file.

Legend: B images, H x W base cells, p base patch side.
"""

import copy
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import write_atomically

FORMAT = "apt_backbones.learned_scorer"
VERSION = "1"
SUFFIX = ".safetensors"


class ScorerTail(nn.Module):
    """Embedded base cells to the logarithm of the scores.

    Args:
        width: channels of a base cell; a patch of twice its side has twice as many, as have all larger ones.
        num_sizes: merged sizes.
    """

    def __init__(self, width: int, num_sizes: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.levels = nn.ModuleList()
        for level in range(num_sizes):
            self.levels.append(
                nn.ModuleDict(
                    {
                        "down": nn.Conv2d(2 * width if level else width, 2 * width, 2, stride=2),
                        "mix": nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                        "far": nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2, groups=4),
                        "out": nn.Conv2d(2 * width, 1, 1),
                    }
                )
            )

    def forward(self, cells: Tensor) -> list[Tensor]:
        """Per size (B, H * p / size, W * p / size), of cells (B, width, H, W); H and W hold whole largest patches."""
        x = F.gelu(self.mix(F.gelu(cells)))
        logs = []
        for level in self.levels:
            x = F.gelu(level["mix"](F.gelu(level["down"](x))))
            x = F.gelu(level["far"](x))
            logs.append(level["out"](x)[:, 0])
        return logs


class LearnedScorer:
    """A pixel scorer whose scores are expected losses of merging, above 0; called as the built-in ones are.

    Computed in float64 and rounded once to float32, so that a selection depends on neither the device nor the
    precision that the model runs in.

    Args:
        stem: from pixels in 0..255, a convolution whose kernel and stride are the base patch.
        tail: what follows.
        origin: what it was distilled from and how, as names and values that JSON can hold.
        name: for messages; the file's.
    """

    def __init__(self, stem: nn.Conv2d, tail: ScorerTail, origin: dict | None = None, name: str = "learned scorer"):
        self.patch_size = stem.kernel_size[0]
        self.sizes = tuple(self.patch_size << (level + 1) for level in range(len(tail.levels)))
        self.origin, self.name = dict(origin or {}), name
        net = copy.deepcopy(nn.Sequential(stem, tail)).requires_grad_(False).eval()
        self._nets = {torch.device("cpu"): net.cpu().double()}

    def __repr__(self) -> str:
        return f"LearnedScorer({self.name!r}, sizes={self.sizes})"

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise ValueError for patch sizes that it was not distilled for."""
        if tuple(sizes) != self.sizes[: len(sizes)]:
            raise ValueError(
                f"{self.name} was distilled for patches of {', '.join(map(str, self.sizes))} pixels on base patches of "
                f"{self.patch_size}; it cannot score sizes {tuple(sizes)}"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """float32 scores (B, H * p // size, W * p // size) per size, of float images (B, 3, height, width), 0..255."""
        self.check_sizes(sizes)
        height, width = images.shape[2:]
        with torch.autocast(images.device.type, enabled=False):
            images = images.clamp(0, 255)
            bottom, right = (-side % self.sizes[-1] for side in (height, width))
            whole = F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
            logs = self._net(images.device)(whole.double())
            scores = [log[:, : height // size, : width // size].exp() for size, log in zip(sizes, logs)]
        # A patch of one colour, padding above all, loses nothing.
        return [(score * _varies(images, size)).float() for size, score in zip(sizes, scores)]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        net = self._nets[torch.device("cpu")]
        weights = {name: tensor.float().contiguous() for name, tensor in net.state_dict().items()}
        about = {"format": FORMAT, "version": VERSION, "patch_size": str(self.patch_size)}
        about |= {"sizes": json.dumps(self.sizes), "origin": json.dumps(self.origin)}
        write_atomically(path, lambda unfinished: save_file(weights, unfinished, about))

    def _net(self, device: torch.device) -> nn.Module:
        if device not in self._nets:
            self._nets[device] = copy.deepcopy(self._nets[torch.device("cpu")]).to(device)
        return self._nets[device]


def load_scorer(path: str | Path) -> LearnedScorer:
    """The scorer in a file, read without executing anything that it holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no scorer at {path}; make it with tools/distill_scorer.py")
    return _load(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=16)
def _load(path: Path, changed: int) -> LearnedScorer:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({str(error).splitlines()[0]})") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no learned scorer; make one with tools/distill_scorer.py")
    if about.get("version") != VERSION:
        raise ValueError(f"{path} holds a scorer of version {about.get('version')}; this code reads {VERSION}")
    try:
        patch_size, num_sizes = int(about["patch_size"]), len(json.loads(about["sizes"]))
        width = len(weights["0.weight"])
        with torch.device("cpu"):  # whatever a model is being built on; its images decide later
            net = nn.Sequential(nn.Conv2d(3, width, patch_size, patch_size), ScorerTail(width, num_sizes))
        net.load_state_dict(weights)
        origin = json.loads(about["origin"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ValueError(f"{path} is damaged: it does not hold the weights that it names ({reason})") from error
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"{path} is damaged: its weights are not finite")
    return LearnedScorer(*net, origin, str(path))


def fold(
    projection: nn.Conv2d,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    center: Tensor,
    spread: Tensor,
    first: nn.Conv2d,
) -> nn.Conv2d:
    """One convolution for normalization, patch projection E, standardization of its channels, and a 1 x 1 convolution.

    Args:
        projection: E, whose kernel and stride are p.
        pixel_mean, pixel_std: of the images' normalization, in 0..255.
        center, spread: mean and standard deviation of E's channels (D,).
        first: from D channels.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (pixel_mean, pixel_std))
    weight_DCpp = projection.weight.detach().cpu().double() / std
    bias_D = -(weight_DCpp * mean).sum((1, 2, 3))
    if projection.bias is not None:
        bias_D = bias_D + projection.bias.detach().cpu().double()
    center, spread = center.cpu().double(), spread.cpu().double()
    mix_cD = first.weight.detach().cpu().double()[:, :, 0, 0] / spread
    folded = nn.Conv2d(3, len(mix_cD), projection.kernel_size, projection.stride).double()
    with torch.no_grad():
        folded.weight.copy_(torch.einsum("cd,dxyz->cxyz", mix_cD, weight_DCpp))
        folded.bias.copy_(mix_cD @ (bias_D - center) + first.bias.detach().cpu().double())
    return folded.float()


def _varies(pixels: Tensor, size: int) -> Tensor:
    """Whether each patch that lies inside has more than one colour (B, H * p // size, W * p // size)."""
    rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
    blocks = pixels[:, :, : rows * size, : columns * size].unflatten(2, (rows, size)).unflatten(4, (columns, size))
    return (blocks != blocks[:, :, :, :1, :, :1]).amax((1, 3, 5))
