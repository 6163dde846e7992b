"""EVA-02's transformer block on packed tokens.

Legend: T tokens of the whole batch, D channels, N heads, H channels per head.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import varlen_attention
from .joined import JoinedLinears
from .layout import PatchLayout, Segments
from .rotary import apply_rotary


class PackedEvaBlock(EvaBlock):
    """timm's EVA block with the same parameters. What changes:

    - attention over packed segments;
    - drop path per image instead of per row;
    - while they are frozen, the projections to q, k and v are one matrix product, and so are SwiGLU's two;
    - in training the gate of SwiGLU is recomputed instead of stored.

    Attributes:
        compile_options: arguments of ``torch.compile`` for what lies before and behind the attention kernel, or None.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile_options: dict | None = None
        self._qkv, self._fc1 = JoinedLinears(), JoinedLinears()

    def forward(
        self, x_TD: Tensor, layout: PatchLayout, segments: Segments, rope: Tensor, backend: str | None
    ) -> Tensor:
        attn, mlp = self.attn, self.mlp
        is_compiled = self.compile_options is not None
        before, behind = PackedEvaBlock._before, PackedEvaBlock._behind
        if is_compiled:
            options = tuple(self.compile_options.items())
            before, behind, rope = _compiled(before, options), _compiled(behind, options), torch.view_as_real(rope)
        q, k, v = before(self, x_TD, rope, self._qkv.of((attn.q_proj, attn.k_proj, attn.v_proj)))
        x_TNH = varlen_attention(q, k, v, segments.cu_seqlens, segments.max_length, segments.lengths, backend)
        if is_compiled and x_TNH._base is not None:
            x_TNH = x_TNH.clone()  # or else it would be compiled anew for every shape of what this is a view of
        keep = [self._drop_path(layout, x_TD.dtype) for _ in range(2)]
        return behind(self, x_TD, x_TNH, keep, self._fc1.of((mlp.fc1_g, mlp.fc1_x)))

    def _before(self, x_TD: Tensor, rope: Tensor, joint: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values (T, N, H)."""
        attn, x_TD = self.attn, self.norm1(x_TD)
        if joint is None:
            q, k, v = (
                layer(x_TD).unflatten(-1, (attn.num_heads, -1)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            return apply_rotary(q, rope), apply_rotary(k, rope), v
        qkv_3TNH = F.linear(x_TD, *joint).unflatten(-1, (3, attn.num_heads, -1)).transpose(0, 1)
        q, k = apply_rotary(qkv_3TNH[:2], rope)
        v = qkv_3TNH[2]
        # The backward pass would keep all three for the sake of the values.
        return q, k, v.contiguous() if v.requires_grad else v

    def _behind(
        self, x_TD: Tensor, x_TNH: Tensor, keep: list[Tensor | None], joint: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The tokens after this block, given what attention made of them."""
        x_TD = x_TD + _scale(self.attn.proj(x_TNH.flatten(1)), keep[0])
        mlp, normed = self.mlp, self.norm2(x_TD)
        if joint is None:
            gate, hidden = mlp.fc1_g(normed), mlp.fc1_x(normed)
        else:
            gate, hidden = F.linear(normed, *joint).chunk(2, dim=-1)
        if hidden.requires_grad and not torch.compiler.is_compiling():  # compilers choose themselves what to recompute
            hidden = checkpoint(self._gated, gate, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._gated(gate, hidden)
        return x_TD + _scale(mlp.fc2(hidden), keep[1])

    def _gated(self, gate: Tensor, hidden: Tensor) -> Tensor:
        return self.mlp.norm(self.mlp.act(gate) * hidden)

    def _drop_path(self, layout: PatchLayout, dtype: torch.dtype) -> Tensor | None:
        """Factor of every token's branch (T, 1): 0 for the images that skip it; None if nothing is ever skipped."""
        rate = getattr(self.drop_path1, "drop_prob", 0.0)
        if not rate or not self.training:
            return None
        keep_B = torch.empty(layout.batch_size, dtype=dtype, device=layout.image_T.device)
        return keep_B.bernoulli_(1 - rate).div_(1 - rate)[layout.image_T][:, None]

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedEvaBlock":
        # The parameters move, so their joint memory would only linger.
        self._qkv, self._fc1 = JoinedLinears(), JoinedLinears()
        return super()._apply(fn, recurse)


def _scale(branch_TD: Tensor, keep_T1: Tensor | None) -> Tensor:
    return branch_TD if keep_T1 is None else branch_TD * keep_T1


@lru_cache
def _compiled(function: Callable, options: tuple) -> Callable:
    """One compiled function for all blocks. Being no attribute of theirs, it does not hinder copies and pickles."""
    return torch.compile(function, dynamic=True, **dict(options))
