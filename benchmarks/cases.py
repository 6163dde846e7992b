"""The ways of running one trunk that are compared, what they keep of an image, and what they ought to cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apt_backbones import APTEva02, PatchLayout
from apt_backbones.trunk import AdaptiveTrunk, find_trunk

from .clock import Parts
from .images import Batch
from .reference_eva02 import ReferenceEva02
from .timm_trunks import ReferenceTimm, TimmTrunks

DENSE_MODES = ("dense", "dense-rect", "packed")
ADAPTIVE_MODES = ("random", "resizing", "apt", "apt-rect")
BACKBONE_STAGES = ("score", "layout", "rotary", "embed", "trunk", "map")
CPU = torch.device("cpu")
# What a config says to mmengine, of files, or for training.
HOST_ONLY = ("type", "init_cfg", "checkpoint", "new_layers", "frozen", "test_dtype", "drop_path_rate", "with_cp")


@dataclass
class Case:
    """One mode of running a model, and what was measured of it.

    Attributes:
        name: mode, then the share of tokens that thresholds were calibrated to.
        model: the trunk; for LLaVA the whole; for scorers the function.
        is_reference: whether others are compared with it.
        rectangular: run on images padded to whole patches instead of to a square.
        head: which of a segmenter's heads it runs with.
        seconds: name of what is timed -> [round][batch].
        stages: of every instrumented run, stage -> seconds.
        tokens, content_kept, padding_kept: per image, and as shares of the base cells of content and padding.
        work: stage -> the tokens per image that it works on, for stages that get fewer by merging.
        gflops: name of what is timed -> per image.
        peak_bytes: what a run needs beyond weights and inputs.
        extra: figures that only one kind of benchmark has.
    """

    name: str
    model: Callable
    is_reference: bool = False
    rectangular: bool = False
    head: str = ""
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    stages: list[dict[str, float]] = field(default_factory=list)
    tokens: float = 0.0
    content_kept: float = 1.0
    padding_kept: float | None = 1.0  # None where there is no padding
    work: dict[str, float] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def is_adaptive(self) -> bool:
        return self.name.split()[0] in ADAPTIVE_MODES

    def images(self, batch: Batch) -> Tensor:
        return batch.rectangle if self.rectangular else batch.square


class Eva02Trunks:
    """EVA-02 in every mode, with one set of random weights.

    Args:
        arguments: of ``APTEva02``; their thresholds and merging do not count.
    """

    def __init__(self, arguments: dict, device: torch.device = CPU):
        self.arguments, self.device = arguments, device
        torch.manual_seed(0)
        with device:
            self.packed = APTEva02(**{**arguments, "thresholds": None}).eval()

    def reference(self) -> nn.Module:
        return ReferenceEva02(self.packed).eval()

    def adaptive(self, **options) -> nn.Module:
        with self.device:
            model = APTEva02(**{**self.arguments, "depth": 1, "out_indices": (0,), "global_blocks": (), **options})
        for name in ("patch_embed", "blocks", "pos_embed", "cls_token", "out_indices", "global_blocks"):
            setattr(model, name, getattr(self.packed, name))
        return model.eval()


def make_cases(
    trunks: Eva02Trunks | TimmTrunks, modes: Sequence[str], thresholds: dict[str, dict[int, float]], padding: str
) -> list[Case]:
    """One case per dense mode, and per adaptive mode and set of thresholds. Where there is no other implementation of
    the dense network the packed one is what others are compared with.

    Args:
        thresholds: label -> thresholds.
        padding: of the adaptive modes.
    """
    cases, reference = [], trunks.reference()
    for mode in modes:
        is_rectangular = mode.endswith("-rect")
        if mode == "packed":
            cases.append(Case(mode, trunks.packed, reference is None))
        elif mode not in DENSE_MODES:
            merge = mode.removesuffix("-rect")
            cases += [
                Case(
                    f"{mode} {label}",
                    trunks.adaptive(thresholds=limits, merge=merge, padding=padding),
                    False,
                    is_rectangular,
                )
                for label, limits in thresholds.items()
            ]
        elif reference is not None:
            cases.append(Case(mode, reference, True, is_rectangular))
    return cases


def core(model: nn.Module) -> AdaptiveTrunk:
    """The packed trunk behind any implementation."""
    return find_trunk(model)


def trunk_parts(model: nn.Module) -> Parts:
    if isinstance(model, ReferenceEva02):
        return {"embed": [(model, "_embed")], "trunk": [(model, "forward")], "map": [(model, "_to_map")]}
    if isinstance(model, ReferenceTimm):
        return {"trunk": [(model, "forward")]}
    trunk = core(model)
    return {
        "score": [(trunk, "select")],
        "layout": [(trunk, "layout")],
        "rotary": [(trunk, "rotations")],
        "embed": [(trunk, "_embed")],
        "trunk": [(model, "forward")],
        "map": [(PatchLayout, "to_map")],
    }


def describe_trunk(case: Case, batches: list[Batch]) -> float:
    """Fill in tokens, and return the blocks' arithmetic in GFLOP per image."""
    model = core(case.model)
    content = content_cells = padding = padding_cells = images_seen = gflops = 0
    for batch in batches:
        images = case.images(batch)
        layout = model.layout(images)
        rows, columns = (side // model.patch_size for side in batch.rectangle.shape[2:])
        is_content = (layout.row_T < rows) & (layout.column_T < columns) & (layout.side_T > 0)
        content += int(is_content.sum())
        content_cells += batch.content_cells
        padding += int(((layout.side_T > 0) & ~is_content).sum())
        padding_cells += len(images) * layout.grid[0] * layout.grid[1] - batch.content_cells
        images_seen += len(images)
        gflops += block_gflops(layout, model)
    case.tokens = (content + padding) / images_seen
    case.content_kept, case.padding_kept = content / content_cells, padding / padding_cells if padding_cells else None
    case.work = dict.fromkeys(BACKBONE_STAGES, case.tokens)
    return gflops / images_seen


def block_gflops(layout: PatchLayout, model: AdaptiveTrunk) -> float:
    """Multiply-adds of the blocks' matrix products times two, in units of 1e9."""
    total = 0
    for index, block in enumerate(model.blocks):
        weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
        lengths = (layout.windows if model.is_windowed(index) else layout.images).lengths
        total += layout.num_tokens * weights + 2 * model.embed_dim * sum(n * n for n in lengths)
    return 2 * total / 1e9
