"""Attention over packed sequences: block-diagonal, one block per segment (APT, section 3.2).

Legend: T tokens of the whole batch, N heads, H channels per head, S segments, L length of one segment.
"""

from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Segments

BACKENDS = ("flash", "varlen", "sdpa")


def varlen_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    segments: Segments,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention in which every token sees exactly the tokens of its own segment.

    Args:
        q_TNH, k_TNH, v_TNH: packed queries, keys, values (T, N, H).
        segments: which tokens see each other (``PatchLayout.images``, ``PatchLayout.windows``, ``Segments.of``).
        backend: "flash" (the flash-attn package), "varlen" (torch.nn.attention.varlen), "sdpa" (PyTorch's
            scaled_dot_product_attention, segments of equal length batched), or None for the first that can run.

    Returns:
        (T, N, H).

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: the backend cannot run on these tensors or this machine; the message says why.
    """
    if backend is None:
        backend = next(name for name in BACKENDS if _why_not(name, q_TNH.device, q_TNH.dtype, q_TNH.shape[-1]) is None)
    elif backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    elif reason := _why_not(backend, q_TNH.device, q_TNH.dtype, q_TNH.shape[-1]):
        raise RuntimeError(f"attention backend {backend!r} cannot be used: {reason}")
    if backend == "sdpa":
        return _sdpa(q_TNH, k_TNH, v_TNH, segments.lengths)
    packing = (segments.cu_seqlens, segments.cu_seqlens, segments.max_length, segments.max_length)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        head_dim = q_TNH.shape[-1]
        if head_dim % 8:  # the kernel divides by the root of the padded size
            q_TNH = q_TNH * (_padded(head_dim) / head_dim) ** 0.5
        q_TNH, k_TNH, v_TNH = map(_for_kernel, (q_TNH, k_TNH, v_TNH))
        out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, *packing)
        return out_TNH[..., :head_dim]
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q_TNH, k_TNH, v_TNH, *packing)


@lru_cache(maxsize=256)
def _why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs only, and the tensors are on {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, and the tensors are {dtype}; run the model under autocast"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    if head_dim > 256:
        return f"it needs a head size of at most 256, and this one is {head_dim}"
    try:
        if backend == "flash":
            from flash_attn import flash_attn_varlen_func  # noqa: F401
        else:
            from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError as error:
        remedy = "pip install flash-attn --no-build-isolation" if backend == "flash" else "install torch >= 2.10"
        return f"{error}; {remedy}"
    return None


def _padded(head_dim: int) -> int:
    return -(-head_dim // 8) * 8


def _for_kernel(x_TNH: Tensor) -> Tensor:
    """Contiguous, on a 16-byte address, head size padded with zeros to a multiple of 8; a copy only if it must be.

    The kernel reads 16-byte vectors: strided or misaligned inputs give wrong results instead of an error.
    """
    if padding := _padded(x_TNH.shape[-1]) - x_TNH.shape[-1]:
        return F.pad(x_TNH, (0, padding))
    if x_TNH.is_contiguous() and x_TNH.data_ptr() % 16 == 0:
        return x_TNH
    return x_TNH.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def _by_length(lengths: tuple[int, ...]) -> dict[int, list[int]]:
    """Length -> the segments that have it, without empty ones. Kept, because all blocks of a batch ask the same."""
    segments_of_length = defaultdict(list)
    for segment, length in enumerate(lengths):
        if length:
            segments_of_length[length].append(segment)
    return dict(segments_of_length)


def _sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, lengths: tuple[int, ...]) -> Tensor:
    segments_of_length = _by_length(lengths)
    if len(segments_of_length) == 1:  # equal lengths (the dense model) and single images: views, no copies
        length = next(iter(segments_of_length))
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_TNH, k_TNH, v_TNH))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    parts = [x.split(lengths) for x in (q_TNH, k_TNH, v_TNH)]
    out = [v_TNH[:0]] * len(lengths)
    for segments in segments_of_length.values():
        q, k, v = (
            part[segments[0]][None] if len(segments) == 1 else torch.stack([part[s] for s in segments])
            for part in parts
        )
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        for segment, x in zip(segments, attended.transpose(1, 2)):
            out[segment] = x
    return torch.cat(out)
