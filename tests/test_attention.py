"""Packed attention equals dense attention under a block-diagonal mask."""

import pytest
import torch
import torch.nn.functional as F

from apt_backbones import Segments, attention, varlen_attention

LENGTHS = [(7,), (4, 4, 4), (5, 1, 9, 5), (0, 3, 0, 3, 8, 0)]


def packed(lengths, num_heads=3, head_dim=16, device="cpu", dtype=torch.float32):
    total = sum(lengths)
    qkv = [torch.randn(total, num_heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    return *qkv, Segments.of(lengths, device)


def masked_dense(q, k, v, lengths):
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    mask = segment[:, None] == segment
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def assert_equals_masked(out, q, k, v, lengths):
    """Forward and gradients are those of dense attention under a block-diagonal mask."""
    expected = masked_dense(q, k, v, lengths)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_a_block_diagonal_mask_forward_and_backward(lengths):
    q, k, v, segments = packed(lengths)
    out = varlen_attention(q, k, v, segments)
    assert_equals_masked(out, q, k, v, lengths)


def test_odd_head_sizes_and_strided_inputs():
    lengths = (5, 3, 5)
    qkv = torch.randn(13, 2, 3 * 5)
    q, k, v = qkv.split(5, dim=-1)
    out = varlen_attention(q, k, v, Segments.of(lengths))
    torch.testing.assert_close(out, masked_dense(q, k, v, lengths), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_an_impossible_backend_says_why(backend):
    q, k, v, segments = packed((4, 4))
    with pytest.raises(RuntimeError, match=f"{backend}.*NVIDIA GPUs only.*'cpu'"):
        varlen_attention(q, k, v, segments, backend=backend)


def test_an_unknown_backend_names_the_known_ones():
    q, k, v, segments = packed((4, 4))
    with pytest.raises(ValueError, match="flash, varlen, sdpa"):
        varlen_attention(q, k, v, segments, backend="xformers")


def strict_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
    """Stands for ``torch.nn.attention.varlen.varlen_attn``: refuses what it would silently get wrong."""
    for x in (q, k, v):
        assert x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[-1] % 8 == 0
    assert max_q == max_k == cu_seqlens_q.diff().max()
    return masked_dense(q, k, v, cu_seqlens_q.diff().tolist())


@pytest.mark.parametrize("head_dim", [4, 16, 20, 24, 40, 72])
@pytest.mark.parametrize("strided", [True, False])
def test_kernels_get_the_inputs_that_they_can_read(monkeypatch, head_dim, strided):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", strict_kernel)
    monkeypatch.setattr(attention, "_why_not", lambda *_: None)
    lengths = (3, 5, 5)
    q, k, v, segments = packed(lengths, head_dim=head_dim)
    if strided:
        q, k, v = torch.randn(13, 3, 3 * head_dim, requires_grad=True).split(head_dim, dim=-1)
    out = varlen_attention(q, k, v, segments, backend="varlen")
    assert_equals_masked(out, q, k, v, lengths)


def test_inputs_are_copied_only_if_they_must_be():
    x = torch.randn(7, 2, 16)
    assert attention._for_kernel(x) is x
    misaligned = torch.randn(7 * 2 * 16 + 1)[1:].view(7, 2, 16)
    for case in (misaligned, x.transpose(0, 1), torch.randn(7, 2, 20)):
        ready = attention._for_kernel(case)
        assert ready.is_contiguous() and ready.data_ptr() % 16 == 0
        assert torch.equal(ready[..., : case.shape[-1]], case) and not ready[..., case.shape[-1] :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, (1024, 300, 1024)])
@pytest.mark.parametrize("head_dim", [20, 24, 40, 64, 72, 80])
def test_gpu_kernels_equal_float32(lengths, head_dim):
    q, k, v, segments = packed(lengths, head_dim=head_dim, device="cuda", dtype=torch.bfloat16)
    out = varlen_attention(q, k, v, segments, backend="varlen")
    expected = masked_dense(q.float(), k.float(), v.float(), lengths)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream.float())
    ):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
def test_gpu_float32_falls_back_to_sdpa_and_says_why_it_must():
    q, k, v, segments = packed((4, 6), head_dim=64, device="cuda")
    out = varlen_attention(q, k, v, segments)
    torch.testing.assert_close(out, masked_dense(q, k, v, (4, 6)), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        varlen_attention(q, k, v, segments, backend="varlen")
