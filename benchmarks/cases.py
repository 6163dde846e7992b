"""The ways of running one trunk that are compared, what they keep of an image, and what they ought to cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apt_backbones import APTEva02, PatchLayout

from .clock import Parts
from .images import Batch
from .reference_eva02 import ReferenceEva02

DENSE_MODES = ("dense", "dense-rect", "packed")
ADAPTIVE_MODES = ("random", "resizing", "apt", "apt-rect")
BACKBONE_STAGES = ("score", "layout", "rotary", "embed", "trunk", "map")
CPU = torch.device("cpu")
HOST_ONLY = ("type", "init_cfg", "test_dtype", "drop_path_rate")  # what a config says to mmengine, or for training


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


def make_cases(
    arguments: dict,
    modes: Sequence[str],
    thresholds: dict[str, dict[int, float]],
    padding: str,
    device: torch.device = CPU,
) -> list[Case]:
    """One case per dense mode, and per adaptive mode and set of thresholds; all share one set of random weights.

    Args:
        arguments: of ``APTEva02``.
        thresholds: label -> thresholds.
        padding: of the adaptive modes.
    """
    torch.manual_seed(0)
    with device:
        dense = APTEva02(**{**arguments, "thresholds": None}).eval()

    def adaptive(merge: str, limits: dict[int, float]) -> APTEva02:
        options = dict(thresholds=limits, merge=merge, padding=padding)
        with device:
            model = APTEva02(**{**arguments, "depth": 1, "out_indices": (0,), "global_blocks": (), **options})
        for name in ("patch_embed", "blocks", "pos_embed", "cls_token", "out_indices", "global_blocks"):
            setattr(model, name, getattr(dense, name))
        return model.eval()

    cases = []
    for mode in modes:
        if mode == "packed":
            cases.append(Case(mode, dense))
        elif mode in DENSE_MODES:
            cases.append(Case(mode, ReferenceEva02(dense).eval(), True, rectangular=mode.endswith("-rect")))
        else:
            merge = mode.removesuffix("-rect")
            cases += [
                Case(f"{mode} {label}", adaptive(merge, limits), rectangular=mode.endswith("-rect"))
                for label, limits in thresholds.items()
            ]
    return cases


def core(model: nn.Module) -> APTEva02:
    """The packed model behind either implementation."""
    return model.model if isinstance(model, ReferenceEva02) else model


def trunk_parts(model: nn.Module) -> Parts:
    if isinstance(model, ReferenceEva02):
        return {"embed": [(model, "_embed")], "trunk": [(model, "forward")], "map": [(model, "_to_map")]}
    return {
        "score": [(model, "select")],
        "layout": [(model, "layout")],
        "rotary": [(model, "rotations")],
        "embed": [(model, "_embed")],
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


def block_gflops(layout: PatchLayout, model: APTEva02) -> float:
    """Multiply-adds of the blocks' matrix products times two, in units of 1e9."""
    dim, hidden = model.embed_dim, model.blocks[0].mlp.fc2.in_features
    total = 0
    for index in range(len(model.blocks)):
        is_global = model.window_size is None or index in model.global_blocks
        lengths = (layout.images if is_global else layout.windows).lengths
        total += layout.num_tokens * (4 * dim * dim + 3 * dim * hidden) + 2 * dim * sum(n * n for n in lengths)
    return 2 * total / 1e9
