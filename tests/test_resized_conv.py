"""The convolution of resized maps, in PyTorch and as a Triton kernel, equals resizing first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from apt_backbones.mm import resized_conv
from apt_backbones.mm.resized_conv import conv3x3_of_resized, shifted_interpolation
from tests.golden import relative_error

ROOT = Path(__file__).parents[1]
sides = st.integers(1, 12)


def plain_conv(maps, weight, bias, align_corners):
    """As mmseg writes it: resize, concatenate, convolve."""
    full = maps[0].shape[2:]
    resized = [F.interpolate(x, full, mode="bilinear", align_corners=align_corners) for x in maps[1:]]
    return F.conv2d(torch.cat([maps[0], *resized], 1), weight, bias, padding=1)


def random_case(sizes, batch=2, out_channels=3, bias=True, **kwargs):
    maps = [torch.randn(batch, 2 + level, *size, **kwargs) for level, size in enumerate(sizes)]
    weight = torch.randn(out_channels, sum(x.shape[1] for x in maps), 3, 3, **kwargs)
    return maps, weight, torch.randn(out_channels, **kwargs) if bias else None


@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    out_channels=st.integers(1, 4),
    bias=st.booleans(),
    align_corners=st.booleans(),
)
def test_convolution_of_resized_maps_of_any_size(sizes, batch, out_channels, bias, align_corners):
    case = random_case(sizes, batch, out_channels, bias, dtype=torch.float64)
    expected = plain_conv(*case, align_corners)
    torch.testing.assert_close(conv3x3_of_resized(*case, align_corners), expected, rtol=0, atol=1e-10)


def test_a_tap_beyond_the_border_reads_zero_and_not_the_border():
    above, here, below = shifted_interpolation(2, 4, False, torch.zeros(()))
    torch.testing.assert_close(here, torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]))
    assert torch.equal(above, torch.cat([torch.zeros(1, 2), here[:-1]]))
    assert torch.equal(below, torch.cat([here[1:], torch.zeros(1, 2)]))


def test_half_precision_is_as_accurate_as_the_plain_computation():
    maps, weight, bias = random_case([(24, 20), (12, 10), (6, 5), (3, 2)], out_channels=8)
    exact = plain_conv(maps, weight, bias, False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cheap = conv3x3_of_resized(maps, weight, bias)
        plain = plain_conv(maps, weight, bias, False)
    assert cheap.dtype == plain.dtype == torch.bfloat16
    error, usual_error = ((x.float() - exact).square().mean().sqrt() for x in (cheap, plain))
    assert error < 1.2 * usual_error


# ------------------------------------------------------------------------------------------- the kernel


# Products lie between NaN: a kernel that reads beyond them shows it.
RUN_KERNEL = """
import sys, torch
from apt_backbones.mm import resized_conv, resized_conv_triton

def surrounded(x):
    memory = torch.full((3, *x.shape), torch.nan, dtype=x.dtype)
    memory[1] = x
    return memory[1]

def add_surrounded(out, maps, align):
    calls.append(out)
    add_shifted(out, [surrounded(x) for x in maps], align)

calls, add_shifted = [], resized_conv_triton._add_shifted
resized_conv_triton._add_shifted = add_surrounded
resized_conv.has_kernel = lambda x: True
outputs = []
for dtype, case in torch.load(sys.argv[1]):
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs.append(resized_conv.conv3x3_of_resized(*case))
assert len(calls) == len(outputs), "the kernel runs in every case"
torch.save(outputs, sys.argv[1])
"""


def test_kernel_equals_the_plain_computation(tmp_path):
    """Triton's interpreter runs it on the CPU: in a process of its own, because triton decides that when imported."""
    cases, expected = [], []
    for dtype, sizes, batch, out_channels, align_corners in (
        (torch.float32, [(4, 9), (2, 4)], 1, 130, False),  # several blocks of columns and of channels
        (torch.float32, [(5, 3), (3, 2), (2, 2)], 2, 3, False),  # several blocks of rows, images and maps
        (torch.float32, [(2, 4), (1, 2)], 1, 3, True),
        (torch.float32, [(2, 1), (3, 2)], 1, 3, True),  # larger than the output
        (torch.bfloat16, [(2, 4), (1, 2)], 1, 3, False),
    ):
        maps, weight, bias = random_case(sizes, batch, out_channels)
        cases.append((dtype, (maps, weight, bias, align_corners)))
        expected.append(plain_conv(maps, weight, bias, align_corners))
    file = tmp_path / "cases.pt"
    torch.save(cases, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN_KERNEL, file], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for (dtype, _), out, reference in zip(cases, torch.load(file), expected, strict=True):
        assert out.dtype == dtype
        assert relative_error(out, reference) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("capability, dtype", [(80, "fp16"), (90, "bf16"), (90, "fp32")])
def test_kernel_compiles_for_gpus_with_vector_loads_and_no_exchange_between_threads(capability, dtype):
    """Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from apt_backbones.mm.resized_conv_triton import CHANNELS, COLUMNS, _add_kernel

    aligned, levels = [["tt.divisibility", 16]], 3
    signature = dict(out_ptr=f"*{dtype}", products=(f"*{dtype}",) * levels, sizes=(("i32", "i32"),) * levels)
    signature.update(dict.fromkeys(("height", "width", "channels"), "i32"))
    signature.update(dict.fromkeys(("ALIGN", "COLUMNS", "CHANNELS"), "constexpr"))
    source = ASTSource(
        _add_kernel,
        signature,
        constexprs={(6,): False, (7,): COLUMNS, (8,): CHANNELS},
        attrs={(0,): aligned, **{(1, level): aligned for level in range(levels)}, (5,): aligned},
    )
    kernel = compile(source, GPUTarget("cuda", capability, 32))
    loads = [line for line in kernel.asm["ptx"].splitlines() if "ld.global" in line]
    assert loads and all(".v4." in line for line in loads)
    assert kernel.metadata.shared == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("height, width", [(64, 64), (127, 95), (1, 3)])
def test_gpu_equals_float64(height, width, align_corners, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sizes = [(height, width)] + [(max(1, height >> level), max(1, width >> level)) for level in (1, 2, 3)]
    for out_channels in (33, 256):
        case = random_case(sizes, out_channels=out_channels, dtype=torch.float64)
        maps, weight, bias = case
        on_gpu = [x.to("cuda", dtype) for x in maps], weight.to("cuda", dtype), bias.to("cuda", dtype)
        out = conv3x3_of_resized(*on_gpu, align_corners)
        assert out.dtype == dtype and out.shape == (2, out_channels, height, width)
        assert relative_error(out.double().cpu(), plain_conv(*case, align_corners)) < tolerance


@pytest.mark.gpu
def test_gpu_without_triton_equals_the_kernel(monkeypatch):
    case = random_case([(30, 22), (15, 11), (7, 5)], device="cuda", dtype=torch.float64)
    maps, weight, bias = ([x.float() for x in case[0]], case[1].float(), case[2].float())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    kernel = conv3x3_of_resized(maps, weight, bias)
    monkeypatch.setattr(resized_conv, "has_kernel", lambda x: False)
    assert relative_error(kernel, conv3x3_of_resized(maps, weight, bias)) < 1e-5


@pytest.mark.gpu
def test_gpu_is_not_waited_for():
    maps, weight, bias = random_case([(32, 32), (16, 16), (8, 8)], out_channels=64, device="cuda")
    conv3x3_of_resized(maps, weight, bias)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        conv3x3_of_resized(maps, weight, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
