"""Packed attention equals dense attention under a block-diagonal mask."""

import pytest
import torch
import torch.nn.functional as F

from apt_backbones import varlen_attention

LENGTHS = [(7,), (4, 4, 4), (5, 1, 9, 5), (0, 3, 0, 3, 8, 0)]


def packed(lengths, num_heads=3, head_dim=16, device="cpu", dtype=torch.float32):
    total = sum(lengths)
    qkv = [torch.randn(total, num_heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return *qkv, cu_seqlens


def masked_dense(q, k, v, lengths):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    mask = segment[:, None] == segment
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("lengths_known", [True, False])
def test_equals_a_block_diagonal_mask_forward_and_backward(lengths, lengths_known):
    q, k, v, cu_seqlens = packed(lengths)
    out = varlen_attention(q, k, v, cu_seqlens, max(lengths), lengths if lengths_known else None)
    expected = masked_dense(q, k, v, lengths)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_odd_head_sizes_and_strided_inputs():
    lengths = (5, 3, 5)
    qkv = torch.randn(13, 2, 3 * 5)
    q, k, v = qkv.split(5, dim=-1)
    out = varlen_attention(q, k, v, torch.tensor([0, 5, 8, 13], dtype=torch.int32), 5, lengths)
    torch.testing.assert_close(out, masked_dense(q, k, v, lengths), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_an_impossible_backend_says_why(backend):
    q, k, v, cu_seqlens = packed((4, 4))
    with pytest.raises(RuntimeError, match=f"{backend}.*NVIDIA GPUs only.*'cpu'"):
        varlen_attention(q, k, v, cu_seqlens, 4, backend=backend)


def test_an_unknown_backend_names_the_known_ones():
    q, k, v, cu_seqlens = packed((4, 4))
    with pytest.raises(ValueError, match="flash, varlen, sdpa"):
        varlen_attention(q, k, v, cu_seqlens, 4, backend="xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, (1024, 300, 1024)])
@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_gpu_kernels_equal_float32(lengths, head_dim):
    q, k, v, cu_seqlens = packed(lengths, head_dim=head_dim, device="cuda", dtype=torch.bfloat16)
    out = varlen_attention(q, k, v, cu_seqlens, max(lengths), lengths, backend="varlen")
    expected = masked_dense(q.float(), k.float(), v.float(), lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream.float())
    ):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
def test_gpu_float32_falls_back_to_sdpa_and_says_why_it_must():
    q, k, v, cu_seqlens = packed((4, 6), head_dim=64, device="cuda")
    out = varlen_attention(q, k, v, cu_seqlens, 6, (4, 6))
    torch.testing.assert_close(out, masked_dense(q, k, v, (4, 6)), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        varlen_attention(q, k, v, cu_seqlens, 6, backend="varlen")
