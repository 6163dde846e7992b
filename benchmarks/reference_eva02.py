"""The dense baseline of the benchmarks: EVA-02 as it is usually run, on maps, with windows cut out and put back.

It is meant to be as fast as such an implementation can be: batched scaled_dot_product_attention, positions and
rotary tables computed once per image size, the same fast rotation as the packed model, and like there one product for
q, k and v and one for SwiGLU while they are frozen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_backbones import APTEva02, PatchLayout, apply_rotary, rotary_table
from apt_backbones.block import FusedBlock


class ReferenceEva02(nn.Module):
    """Runs the weights of a dense ``APTEva02`` (shared, not copied) without packing.

    Equal to it wherever the window divides the grid; elsewhere windows are filled with zero tokens that take part in
    attention, as ViTDet does.
    """

    def __init__(self, model: APTEva02):
        super().__init__()
        if model.thresholds or model.padding != "coarsest":
            raise ValueError("the reference implementation is dense: give it a model without thresholds")
        self.model, self.patch_size, self.run_block = model, model.patch_size, run_block
        self._fused = [FusedBlock() for _ in model.blocks]
        self._constants: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        x, (height, width) = self._embed(model._pad(images))
        _, image_rope, window_rope = self._constants_of(height, width, images.device)
        maps = {}
        for index, block in enumerate(model.blocks):
            window, rope = model.window_size, window_rope
            if window is None or index in model.global_blocks:
                window, rope = None, image_rope
            rope = torch.view_as_real(rope) if self.run_block is not run_block else rope
            x = self.run_block(block, x, rope, window, (height, width), *_fused(block, self._fused[index]))
            if index in model.out_indices:
                maps[index] = self._to_map(x, height, width)
        return tuple(maps[index] for index in model.out_indices)

    def compile_blocks(self, **options) -> "ReferenceEva02":
        """Compile whole blocks, attention included, for each size of images and windows; as ``APTEva02``'s."""
        torch._dynamo.config.recompile_limit = 64  # or else the ninth size would silently run uncompiled
        self.run_block = torch.compile(run_block, dynamic=False, **options)
        return self

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, D), a CLS token first where the model has one, and the grid."""
        model = self.model
        x = model.patch_embed.proj(images.to(model.patch_embed.proj.weight.dtype)).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        x = (x + self._constants_of(*grid, images.device)[0].to(x.dtype)).flatten(1, 2)
        if model.cls_token is not None:
            cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        return x, grid

    def _to_map(self, x: Tensor, height: int, width: int) -> Tensor:
        return x[:, self.model.num_prefix :].transpose(1, 2).unflatten(2, (height, width)).contiguous()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _constants_of(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positions (H, W, D) and rotations for images and for windows, kept per image size."""
        if (height, width) not in self._constants:
            model = self.model
            positions = model.positions((height, width))[0, :, :height, :width].permute(1, 2, 0)
            rope = dict(head_dim=model.embed_dim // model.num_heads, rope_position=model.rope_position)
            layout = PatchLayout.dense(1, (height, width), model.patch_size, None, model.num_prefix, device)
            image_rope = rotary_table(layout, length=max(model.train_grid, height, width), **rope)
            window_rope = None
            if model.window_size is not None:
                one_window = (model.window_size, model.window_size)
                layout = PatchLayout.dense(1, one_window, model.patch_size, model.window_size, device=device)
                window_rope = rotary_table(layout, length=model.window_size, **rope)
            self._constants[height, width] = (positions, image_rope, window_rope)
        return self._constants[height, width]


def run_block(
    block: nn.Module,
    x: Tensor,
    rope: Tensor,
    window: int | None,
    grid: tuple[int, int],
    joint_qkv: tuple[Tensor, Tensor] | None,
    joint_gate: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One block on tokens (B, N, D), of a grid of cells where it has windows.

    Args:
        rope: rotations of one image's or one window's tokens.
        joint_qkv, joint_gate: weight and bias of the layers side by side, or None to run them one by one.
    """
    attn, mlp, normed = block.attn, block.mlp, block.norm1(x)
    if window is not None:
        normed, padded = _partition(normed.unflatten(1, grid), window)
    q, k, v = (
        part.unflatten(-1, (attn.num_heads, -1))
        for part in _linear(normed, (attn.q_proj, attn.k_proj, attn.v_proj), joint_qkv)
    )
    q, k, v = (part.transpose(1, 2) for part in (apply_rotary(q, rope), apply_rotary(k, rope), v))
    attended = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    if window is not None:
        attended = _unpartition(attended, window, padded, grid).flatten(1, 2)
    x = x + attended
    gate, hidden = _linear(block.norm2(x), (mlp.fc1_g, mlp.fc1_x), joint_gate)
    return x + mlp.fc2(mlp.norm(mlp.act(gate) * hidden))


def _fused(block: nn.Module, fused: FusedBlock) -> tuple:
    attn, mlp = block.attn, block.mlp
    return fused.qkv.fuse((attn.q_proj, attn.k_proj, attn.v_proj)), fused.fc1.fuse((mlp.fc1_g, mlp.fc1_x))


def _linear(x: Tensor, layers: Sequence[nn.Linear], joint: tuple[Tensor, Tensor] | None) -> Sequence[Tensor]:
    return [layer(x) for layer in layers] if joint is None else F.linear(x, *joint).chunk(len(layers), dim=-1)


def _partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, H, W, D) -> windows (n, window^2, D) and the padded (H, W)."""
    bottom, right = (-side % window for side in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
    height, width = x.shape[1:3]
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
    return x.reshape(-1, window * window, x.shape[-1]), (height, width)


def _unpartition(windows: Tensor, window: int, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    rows, columns = padded[0] // window, padded[1] // window
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, *padded, windows.shape[-1])[:, : size[0], : size[1]]
