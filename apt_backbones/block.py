"""timm's transformer blocks on packed tokens.

A block's modules and parameters stay timm's. What changes: attention runs over packed segments; drop path skips whole
images instead of rows; while they are frozen, separate projections to q, k and v are one matrix product, and so are
SwiGLU's two; in training the gate of SwiGLU is recomputed instead of stored. A block that holds anything else than
what is applied here is refused (``check_block``).

Legend: T tokens of the whole batch, D channels, N heads, H channels per head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import varlen_attention
from .fused import FusedLinears
from .layout import PatchLayout, Segments
from .rotary import apply_rotary
from .token_adapter import TokenAdapter

_PRE_NORM, _POST_NORM = (Block, EvaBlock), (EvaBlockPostNorm, ResPostBlock)
_ATTENTION = (Attention, AttentionRope, EvaAttention)
_MLP = (Mlp, GluMlp, SwiGLU)


class FusedBlock:
    """The fused layers of one block."""

    def __init__(self):
        self.qkv, self.fc1 = FusedLinears(), FusedLinears()


class Call(NamedTuple):
    """What all blocks of a forward pass share.

    Attributes:
        layout: the batch.
        backend: of attention, see ``varlen_attention``.
        compile_options: arguments of ``torch.compile`` for what lies before and after the attention kernel, or None.
    """

    layout: PatchLayout
    backend: str | None = None
    compile_options: dict | None = None


def check_block(block: nn.Module) -> None:
    """Raise unless ``run_block`` applies everything that a block does.

    Raises:
        TypeError: a block, attention or MLP of another class, named in the message.
        ValueError: dropout of attention weights, which packed attention does not have.
    """
    for part, module, supported in (
        ("blocks", block, _PRE_NORM + _POST_NORM),
        ("attention", getattr(block, "attn", None), _ATTENTION),
        ("an MLP", getattr(block, "mlp", None), _MLP),
    ):
        if type(module) not in supported:
            raise TypeError(
                f"{part} of class {type(module).__name__} cannot run on packed tokens (it may hold relative position "
                f"biases or mix tokens in another way); supported are {', '.join(kind.__name__ for kind in supported)}"
            )
    if block.attn.attn_drop.p:
        raise ValueError("packed attention has no dropout of attention weights; create the model with attn_drop_rate=0")


def projections_of(block: nn.Module) -> tuple[nn.Linear, ...]:
    """What makes queries, keys and values in a block that passed ``check_block``."""
    fused = getattr(block.attn, "qkv", None)
    return (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj) if fused is None else (fused,)


def run_block(
    block: nn.Module,
    x_TD: Tensor,
    call: Call,
    segments: Segments,
    rotation: Tensor | None,
    fused: FusedBlock,
    adapter: TokenAdapter | None = None,
) -> Tensor:
    """The tokens (T, D) after a block that passed ``check_block``.

    Args:
        block: timm's block.
        x_TD: packed tokens.
        call: what all blocks share.
        segments: which tokens attend to each other in this block.
        rotation: of queries and keys (``rotary.apply_rotary``), or None.
        fused: the block's fused layers.
        adapter: of merged patches' tokens.
    """
    mlp = block.mlp
    before, after = _before_attention, _after_attention
    is_compiled = call.compile_options is not None
    if is_compiled:
        before, after = (_compiled(function, call.compile_options) for function in (before, after))
        rotation = None if rotation is None else torch.view_as_real(rotation)
    projections = projections_of(block)
    qkv = fused.qkv.fuse(projections) if len(projections) > 1 else None
    fc1 = fused.fc1.fuse((mlp.fc1_g, mlp.fc1_x)) if isinstance(mlp, SwiGLU) else None
    is_merged = None if adapter is None else call.layout.is_merged_T1
    q, k, v, gate = before(block, x_TD, rotation, qkv, adapter, is_merged)
    x_TNH = varlen_attention(q, k, v, segments, call.backend)
    del q, k, v  # the MLP takes their memory
    if is_compiled and x_TNH._base is not None:
        x_TNH = x_TNH.clone()  # or else it would be compiled anew for every shape of what this is a view of
    keep = [_keep(drop, call.layout, x_TD.dtype) for drop in (block.drop_path1, block.drop_path2)]
    return after(block, x_TD, x_TNH, gate, keep, fc1, adapter, is_merged)


def _is_pre_norm(block: nn.Module) -> bool:
    block = getattr(block, "original_module", block)  # of PEFT's wrapper, for blocks that train as a whole
    if not isinstance(block, _PRE_NORM + _POST_NORM):
        raise TypeError(
            f"a block was wrapped in {type(block).__name__}, whose own work packed tokens would pass by; use "
            "compile_blocks() to compile blocks, and set_grad_checkpointing() to recompute them"
        )
    return isinstance(block, _PRE_NORM)


def _before_attention(
    block: nn.Module,
    x_TD: Tensor,
    rotation: Tensor | None,
    fused: tuple[Tensor, Tensor] | None,
    adapter: TokenAdapter | None,
    is_merged: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rotated queries and keys and values (T, N, H), and the gate of attention's output."""
    attn = block.attn
    if _is_pre_norm(block):
        x_TD = block.norm1(x_TD)
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x_TD).sigmoid()
    half = getattr(attn, "rotate_half", False)
    is_plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    if fused is not None and is_plain and attn.q_proj.out_features == attn.k_proj.out_features:
        qkv = F.linear(x_TD, *fused)
        if adapter is not None:
            qkv = qkv + adapter.qkv(x_TD, is_merged)
        qkv_3TNH = qkv.unflatten(-1, (3, attn.num_heads, -1)).transpose(0, 1)
        v = qkv_3TNH[2]
        q, k = qkv_3TNH[:2] if rotation is None else apply_rotary(qkv_3TNH[:2], rotation, half)
        # The backward pass would keep all three for the sake of the values.
        return q, k, v.contiguous() if v.requires_grad else v, gate
    parts = _projected(attn, x_TD)
    if adapter is not None:
        added = adapter.qkv(x_TD, is_merged).split([part.shape[1] for part in parts], 1)
        parts = [part + extra for part, extra in zip(parts, added)]
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in parts)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotation is not None:
        q, k = (apply_rotary(x, rotation, half) for x in (q, k))
    if q.shape[1] != k.shape[1]:  # grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return q.to(v.dtype), k.to(v.dtype), v, gate


def _projected(attn: nn.Module, x_TD: Tensor) -> tuple[Tensor, ...]:
    if getattr(attn, "qkv", None) is None:
        return attn.q_proj(x_TD), attn.k_proj(x_TD), attn.v_proj(x_TD)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x_TD).chunk(3, dim=-1)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    is_plain = type(attn.qkv) is nn.Linear and not attn.qkv_bias_separate  # an adapter's weight is not all that it adds
    qkv = F.linear(x_TD, attn.qkv.weight, bias) if is_plain else attn.qkv(x_TD) + bias
    return qkv.chunk(3, dim=-1)


def _after_attention(
    block: nn.Module,
    x_TD: Tensor,
    x_TNH: Tensor,
    gate: Tensor | None,
    keep: list[Tensor | None],
    fused: tuple[Tensor, Tensor] | None,
    adapter: TokenAdapter | None,
    is_merged: Tensor | None,
) -> Tensor:
    """The tokens after a block, given what attention made of them."""
    x_TD = x_TD + _scale(_attended(block, x_TNH, gate), keep[0])
    is_pre_norm = _is_pre_norm(block)
    input_TD = block.norm2(x_TD) if is_pre_norm else x_TD
    branch_TD = _mlp(block.mlp, input_TD, fused)
    branch_TD = _layer_scale(block, 2, branch_TD) if is_pre_norm else block.norm2(branch_TD)
    x_TD = x_TD + _scale(branch_TD, keep[1])
    return x_TD if adapter is None else x_TD + adapter.mlp(input_TD, is_merged)


def _attended(block: nn.Module, x_TNH: Tensor, gate: Tensor | None) -> Tensor:
    """The branch of attention (T, D)."""
    attn, x_TD = block.attn, block.attn.norm(x_TNH.flatten(1))
    x_TD = attn.proj_drop(attn.proj(x_TD if gate is None else x_TD * gate))
    return _layer_scale(block, 1, x_TD) if _is_pre_norm(block) else block.norm1(x_TD)


def _layer_scale(block: nn.Module, branch: int, x_TD: Tensor) -> Tensor:
    if (scale := getattr(block, f"ls{branch}", None)) is not None:
        return scale(x_TD)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x_TD if gamma is None else gamma * x_TD


def _mlp(mlp: nn.Module, x_TD: Tensor, fused: tuple[Tensor, Tensor] | None) -> Tensor:
    if not isinstance(mlp, SwiGLU):
        return mlp(x_TD)
    gate, hidden = (mlp.fc1_g(x_TD), mlp.fc1_x(x_TD)) if fused is None else F.linear(x_TD, *fused).chunk(2, dim=-1)
    is_dropped = mlp.training and mlp.drop1.p > 0
    # Compilers choose themselves what to recompute.
    if hidden.requires_grad and not is_dropped and not torch.compiler.is_compiling():
        hidden = checkpoint(_gated, mlp, gate, hidden, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = _gated(mlp, gate, hidden)
    return mlp.drop2(mlp.fc2(hidden))


def _gated(mlp: SwiGLU, gate: Tensor, hidden: Tensor) -> Tensor:
    return mlp.norm(mlp.drop1(mlp.act(gate) * hidden))


def _keep(drop_path: nn.Module, layout: PatchLayout, dtype: torch.dtype) -> Tensor | None:
    """Factor of every token's branch (T, 1): 0 for the images that skip it; None if nothing is ever skipped."""
    rate = getattr(drop_path, "drop_prob", 0.0)
    if not rate or not drop_path.training:
        return None
    keep_B = torch.empty(layout.batch_size, dtype=dtype, device=layout.image_T.device).bernoulli_(1 - rate)
    if drop_path.scale_by_keep and rate < 1:
        keep_B.div_(1 - rate)
    return keep_B[layout.image_T][:, None]


def _scale(branch_TD: Tensor, keep_T1: Tensor | None) -> Tensor:
    return branch_TD if keep_T1 is None else branch_TD * keep_T1


def _compiled(function: Callable, options: dict) -> Callable:
    """One compiled function for all blocks. Being no attribute of theirs, it does not hinder copies and pickles."""
    key = function, repr(sorted(options.items()))  # some options are dictionaries
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(function, **{"dynamic": True, **options})
    return _COMPILED[key]


_COMPILED: dict[tuple[Callable, str], Callable] = {}
