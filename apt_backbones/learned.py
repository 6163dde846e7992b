"""A scorer with weights: how much a frozen network's output changes if a patch is merged, predicted from pixels.

``distill`` trains it without labels; a file holds it. Wherever the name of a pixel scorer is taken, so is the name of
such a file.

It computes in fixed point: weights and activations are whole numbers of at most ten bits, and every sum stays below
2 ** 24, so that float32 (and TF32) products are exact in whatever order a device adds them up. A selection therefore
depends on neither the device nor the precision that the model runs in.

Legend: B images, H x W base cells, p base patch side, K inputs and O outputs of a layer.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import write_atomically

FORMAT = "apt_backbones.learned_scorer"
VERSION = "2"
SUFFIX = ".safetensors"
LARGEST = 1023  # ten bits: TF32 has eleven
EXACT = 2**24  # whole numbers up to here are exact in float32
LEAST_RANGE = 4.0  # GELU is zero below its negative


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
                        "far": nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2),
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


class Range(NamedTuple):
    """Least and greatest input per channel (C,), whole numbers, of which neither is on the wrong side of 0."""

    low: Tensor
    high: Tensor


PIXELS = Range(*torch.tensor([[0.0], [255.0]], device="cpu"))  # wherever it is imported


class Layer(NamedTuple):
    """A convolution and its activation function in fixed point, whose inputs are gathered beforehand.

    Attributes:
        weight: (K, O), whole numbers up to ``LARGEST``.
        bias: (O,), whole numbers.
        step: (O,), powers of two: 1 of the sum in units of the table's places, or of the last layer's output.
        unit: float64 (O,), what a place is in the units of the convolution; None for a last layer.
        table: whole numbers up to ``LARGEST``: for every different unit, GELU of -LARGEST..LARGEST places.
        zero: int32 (O,), where in the table a channel's GELU of 0 is.
    """

    weight: Tensor
    bias: Tensor
    step: Tensor
    unit: Tensor | None = None
    table: Tensor | None = None
    zero: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., O) of (..., K)."""
        total = torch.addmm(self.bias, x.flatten(0, -2), self.weight).mul_(self.step)
        if self.table is not None:
            place = total.round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0).int().add_(self.zero)
            total = self.table.index_select(0, place.view(-1))
        return total.view(*x.shape[:-1], -1)

    def activated(self, unit: Tensor) -> tuple["Layer", Tensor]:
        """The layer with GELU's table for units (O,), and the units of what it then gives (O,)."""
        units, row = unit.unique(return_inverse=True)
        values = F.gelu(torch.arange(-LARGEST, LARGEST + 1, device=unit.device) * units[:, None])
        unit_of_output = values.amax(1) / LARGEST
        table = (values / unit_of_output[:, None]).round().float().flatten()
        zero = (row * (2 * LARGEST + 1) + LARGEST).int()
        return self._replace(unit=unit, table=table, zero=zero), unit_of_output[row]

    def range(self) -> Range:
        """Of what it gives: GELU goes far up, but only a little below 0."""
        rows = self.table.unflatten(0, (-1, 2 * LARGEST + 1))[(self.zero // (2 * LARGEST + 1)).long()]
        return Range(rows.amin(1), rows.amax(1))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Layer":
        moved = (part if part is None else part.to(device, part.dtype if part is self.zero else dtype) for part in self)
        return Layer(*moved)


class LearnedScorer:
    """A pixel scorer whose scores are expected losses of merging, above 0; called as the built-in ones are.

    Args:
        layers: by name: "stem", on the pixels of base patches; "mix"; and per merged size n = 0, 1, ...
            "n.down", "n.mix", "n.far" and "n.out" of a ``ScorerTail``.
        patch_size: p.
        origin: what it was distilled from and how, as names and values that JSON can hold.
        name: for messages; the file's.
    """

    def __init__(
        self, layers: dict[str, Layer], patch_size: int, origin: dict | None = None, name: str = "learned scorer"
    ):
        self.patch_size = patch_size
        self.sizes = tuple(patch_size << (level + 1) for level in range(sum(key.endswith(".out") for key in layers)))
        self.origin, self.name = dict(origin or {}), name
        self._layers = {(torch.device("cpu"), torch.float32): layers}

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
        layers, (height, width) = self._for(images.device, _type_of_sums()), images.shape[2:]
        with torch.autocast(images.device.type, enabled=False):
            pixels = _pixels_of_cells(images, self.patch_size, self.sizes[-1])
            logs = _run(pixels.to(layers["stem"].weight.dtype), len(sizes), lambda name, x: layers[name](x))
            varies = _varies(pixels, len(sizes))
        # A patch of one colour, padding above all, loses nothing.
        scores = [(log.double().exp() * patches).float() for log, patches in zip(logs, varies)]
        return [score[:, : height // size, : width // size] for size, score in zip(sizes, scores)]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {}
        for name, layer in self._layers[torch.device("cpu"), torch.float32].items():
            tensors[f"{name}.weight"] = layer.weight.to(torch.int16)
            tensors[f"{name}.bias"] = layer.bias.to(torch.int32)
            tensors[f"{name}.step"] = layer.step
            if layer.unit is not None:
                tensors[f"{name}.unit"] = layer.unit
        about = {"format": FORMAT, "version": VERSION, "patch_size": str(self.patch_size)}
        about |= {"sizes": json.dumps(self.sizes), "origin": json.dumps(self.origin)}
        write_atomically(path, lambda unfinished: save_file(tensors, unfinished, about))

    def _for(self, device: torch.device, dtype: torch.dtype) -> dict[str, Layer]:
        if (device, dtype) not in self._layers:
            whole = self._layers[torch.device("cpu"), torch.float32]
            self._layers[device, dtype] = {name: layer.to(device, dtype) for name, layer in whole.items()}
        return self._layers[device, dtype]


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({str(error).splitlines()[0]})") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} holds no learned scorer; make one with tools/distill_scorer.py")
    if about.get("version") != VERSION:
        raise ValueError(
            f"{path} holds a scorer of version {about.get('version')}, but this code reads {VERSION}; distil it again "
            "with tools/distill_scorer.py"
        )
    try:
        patch_size, num_sizes = int(about["patch_size"]), len(json.loads(about["sizes"]))
        width, layers, inputs_of = tensors["stem.weight"].shape[1], {}, PIXELS
        for name, (inputs, outputs) in _shapes(patch_size, width, num_sizes).items():
            layer = Layer(*(tensors[f"{name}.{part}"].float() for part in ("weight", "bias", "step")))
            if not name.endswith(".out"):
                layer = layer._replace(unit=tensors[f"{name}.unit"])
            for found, shape in zip(layer, ((inputs, outputs), (outputs,), (outputs,), (outputs,))):
                if found is not None and found.shape != shape:
                    raise ValueError(f"{name} has shape {tuple(found.shape)} where {shape} is due")
            if layer.unit is not None:
                layer, _ = layer.activated(layer.unit)
            finite = all(part is None or part.isfinite().all() for part in layer)
            if not finite or _is_inexact(layer.weight, layer.bias, inputs_of).any():
                raise ValueError(f"{name} has values out of range")
            layers[name], inputs_of = layer, inputs_of if layer.unit is None else layer.range()
        origin = json.loads(about["origin"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ValueError(f"{path} is damaged: it does not hold the weights that it names ({reason})") from error
    return LearnedScorer(layers, patch_size, origin, str(path))


@torch.no_grad()
def in_fixed_point(stem: nn.Conv2d, tail: ScorerTail, pixels: Tensor, origin: dict | None = None) -> LearnedScorer:
    """What a trained scorer becomes.

    Layer by layer, the channels' ranges are those that occur in some images, as the layers before them compute in fixed
    point.

    Args:
        stem: from pixels in 0..255, a convolution whose kernel and stride are the base patch.
        tail: what follows.
        pixels: uint8 or float images (B, 3, height, width) in 0..255.
        origin: see ``LearnedScorer``.
    """
    convolutions = {"stem": stem, "mix": tail.mix}
    for number, level in enumerate(tail.levels):
        convolutions |= {f"{number}.{name}": convolution for name, convolution in level.items()}
    layers, inputs_of, unit_of_input = {}, PIXELS, torch.ones(1, dtype=torch.float64)

    def convert(name: str, x: Tensor) -> Tensor:
        nonlocal inputs_of, unit_of_input
        weight, bias = _matrix(convolutions[name])
        weight = weight * unit_of_input.repeat(len(weight) // len(unit_of_input))[:, None]
        if name.endswith(".out"):
            layers[name] = _rounded(weight, bias, torch.ones_like(bias), inputs_of)
        else:
            sums = x.flatten(0, -2).double() @ weight + bias
            reach = torch.maximum(sums.amax(0), (-sums.amin(0)).clamp(1 / 16, LEAST_RANGE))
            unit = (2 * reach.log2()).ceil().div(2).exp2() / LARGEST  # few different ones: small tables
            layers[name], unit_of_input = _rounded(weight, bias, unit, inputs_of).activated(unit)
            inputs_of = layers[name].range()
        return layers[name](x)

    p, num_sizes = stem.kernel_size[0], len(tail.levels)
    _run(_pixels_of_cells(pixels.cpu().float(), p, p << num_sizes), num_sizes, convert)
    return LearnedScorer(layers, p, origin)


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
    parts = (center, spread, first.weight.detach(), first.bias.detach())
    weight, bias = folded_tensors(weight_DCpp, bias_D, *(part.cpu().double() for part in parts))
    folded = nn.Conv2d(3, len(bias), projection.kernel_size, projection.stride).double()
    with torch.no_grad():
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded.float()


def folded_tensors(
    weight_DCpp: Tensor, bias_D: Tensor, center: Tensor, spread: Tensor, first_cD11: Tensor, first_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight (c, C, p, p) and bias (c,) of a convolution, the standardization of its channels, and a 1 x 1 convolution
    in one. Differentiable."""
    mix_cD = first_cD11[:, :, 0, 0] / spread
    return torch.einsum("cd,dxyz->cxyz", mix_cD, weight_DCpp), mix_cD @ (bias_D - center) + first_c


def _pixels_of_cells(images: Tensor, p: int, largest: int) -> Tensor:
    """Whole numbers (B, H, W, 3 * p * p) of images whose edges are repeated to whole patches of the largest size."""
    bottom, right = (-side % largest for side in images.shape[2:])
    if bottom or right:
        images = F.pad(images, (0, right, 0, bottom), mode="replicate")
    cells_B3HpWp = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))
    cells_BHW3pp = cells_B3HpWp.permute(0, 2, 4, 1, 3, 5).clone(memory_format=torch.contiguous_format)
    return cells_BHW3pp.clamp_(0, 255).round_().flatten(3)


def _run(pixels_BHWK: Tensor, num_sizes: int, layer: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
    """Logarithms of the scores (B, H >> n + 1, W >> n + 1) per size; ``layer`` applies the one of a name."""
    x = layer("stem", pixels_BHWK)
    x, logs = layer("mix", _around(x, 1)), []
    for number in range(num_sizes):
        x = layer(f"{number}.down", _fours(x))
        x = layer(f"{number}.mix", _around(x, 1))
        x = layer(f"{number}.far", _around(x, 2))
        logs.append(layer(f"{number}.out", x)[..., 0])
    return logs


def _fours(x_BHWC: Tensor) -> Tensor:
    """Cells of two rows and two columns side by side: (B, H / 2, W / 2, 4 * C)."""
    return x_BHWC.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)


def _around(x_BHWC: Tensor, step: int) -> Tensor:
    """Every cell with its eight neighbours at a distance (B, H, W, 9 * C); outside are zeros."""
    batch, height, width, channels = x_BHWC.shape
    padded = F.pad(x_BHWC, (0, 0, step, step, step, step))
    image, row, column, channel = padded.stride()
    strides = (image, row, column, step * row, step * column, channel)
    return padded.as_strided((batch, height, width, 3, 3, channels), strides).flatten(3)


def _varies(pixels_BHWK: Tensor, num_sizes: int) -> list[Tensor]:
    """Per size whether each patch has more than one colour (B, H >> n + 1, W >> n + 1)."""
    colors = pixels_BHWK.unflatten(3, (3, -1))
    low, high, varies = colors.amin(4).permute(0, 3, 1, 2), colors.amax(4).permute(0, 3, 1, 2), []
    for _ in range(num_sizes):
        low, high = -F.max_pool2d(-low, 2), F.max_pool2d(high, 2)
        varies.append((low != high).any(1))
    return varies


def _shapes(p: int, width: int, num_sizes: int) -> dict[str, tuple[int, int]]:
    """K and O of every layer."""
    shapes, inputs = {"stem": (3 * p * p, width), "mix": (9 * width, width)}, width
    for number in range(num_sizes):
        shapes[f"{number}.down"] = (4 * inputs, 2 * width)
        shapes[f"{number}.mix"] = shapes[f"{number}.far"] = (18 * width, 2 * width)
        shapes[f"{number}.out"] = (2 * width, 1)
        inputs = 2 * width
    return shapes


def _matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weights (K, O) in the order in which inputs are gathered, and bias (O,); float64."""
    weight, bias = (part.detach().cpu().double() for part in (convolution.weight, convolution.bias))
    if convolution.in_channels == 3:  # of pixels, channel by channel
        return weight.flatten(1).T, bias
    return weight.permute(2, 3, 1, 0).flatten(0, 2), bias


def _rounded(weight: Tensor, bias: Tensor, unit: Tensor, inputs_of: Range) -> Layer:
    """In fixed point: as fine as ``LARGEST`` and ``EXACT`` allow, with steps that are powers of two in ``unit``s."""
    exponent = (LARGEST * unit / weight.abs().amax(0).clamp(min=1e-9)).log2().floor().clamp(max=24)
    while True:
        step = torch.exp2(-exponent)
        whole, offset = (weight / (unit * step)).round(), (bias / (unit * step)).round()
        inexact = _is_inexact(whole, offset, inputs_of)
        if not inexact.any():
            return Layer(whole.float().contiguous(), offset.float(), step.float())
        exponent = exponent - inexact.double()


def _is_inexact(weight: Tensor, bias: Tensor, inputs_of: Range) -> Tensor:
    """Whether float32 may round a product, or a sum of some of the products, of a layer's whole numbers (O,)."""
    ends = [weight * end.to(weight).repeat(len(weight) // len(end))[:, None] for end in inputs_of]
    highest = torch.maximum(*ends).sum(0) + bias.clamp(min=0)
    lowest = torch.minimum(*ends).sum(0) + bias.clamp(max=0)
    return (weight.abs().amax(0) > LARGEST) | (torch.maximum(highest, -lowest) >= EXACT)


def _type_of_sums() -> torch.dtype:
    """float64 where the user lets float32 products have bfloat16's eight bits."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9; it knows the older setting, too
    allowed = torch.get_float32_matmul_precision() == "medium" if matmul is None else matmul.fp32_precision == "bf16"
    return torch.float64 if allowed else torch.float32
