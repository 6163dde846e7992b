"""The cheap UPerHead computes what mmseg's computes, with less arithmetic, and never from stale weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models import UPerHead
from mmseg.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apt_backbones import load_converted, read_checkpoint
from apt_backbones.mm import resized_conv, upernet
from apt_backbones.mm.resized_conv import conv3x3_of_resized, shifted_interpolation
from tests.golden import relative_error

CONFIGS = Path(__file__).parents[1] / "seg_configs"
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


def head(kind="FastUPerHead", **kwargs) -> nn.Module:
    """A small head as after training: nothing is zero, one or equal by accident."""
    init_default_scope("mmseg")
    norm_cfg = kwargs.pop("norm_cfg", dict(type="BN"))
    options = dict(in_channels=[6, 5, 4, 7], in_index=[0, 1, 2, 3], channels=8, num_classes=5, **kwargs)
    torch.manual_seed(1)
    model = MODELS.build(dict(type=kind, norm_cfg=norm_cfg, **options)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def pyramid(height, width, batch=1, **kwargs):
    """Maps as a neck gives them, each half as large as the one before: rounded down, where that is odd."""
    return [
        torch.randn(batch, channels, max(1, height >> level), max(1, width >> level), **kwargs)
        for level, channels in enumerate([6, 5, 4, 7])
    ]


@pytest.fixture
def cheap_calls(monkeypatch):
    """How often the cheap computation ran."""
    calls = []

    def counted(*args):
        calls.append(args)
        return conv3x3_of_resized(*args)

    monkeypatch.setattr(upernet, "conv3x3_of_resized", counted)
    return calls


# ------------------------------------------------------------------------------------------- the convolution


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


RUN_KERNEL = """
import sys, torch
from apt_backbones.mm.resized_conv_triton import add_resized_products
cases = torch.load(sys.argv[1])
torch.save([add_resized_products(*case) for case in cases], sys.argv[1])
"""


def test_kernel_equals_the_plain_computation(tmp_path):
    """Triton's interpreter runs it on the CPU: in a process of its own, because triton decides that when imported."""
    cases, expected = [], []
    for sizes, batch, out_channels, align_corners in (
        ([(4, 8), (2, 4)], 1, 130, False),  # exact ratio, two blocks of channels
        ([(5, 9), (3, 4), (2, 2)], 2, 3, False),  # other ratios, incomplete blocks
        ([(5, 6), (2, 3)], 1, 3, True),
        ([(1, 1), (3, 2)], 1, 3, False),  # larger than the output
    ):
        maps, weight, bias = random_case(sizes, batch, out_channels)
        weights = weight.split([x.shape[1] for x in maps], dim=1)
        full = F.conv2d(maps[0], weights[0].contiguous(), bias, padding=1).contiguous(memory_format=torch.channels_last)
        cases.append((full, maps[1:], weights[1:], align_corners))
        expected.append(plain_conv(maps, weight, bias, align_corners))
    file = tmp_path / "cases.pt"
    torch.save(cases, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run([sys.executable, "-c", RUN_KERNEL, file], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for out, reference in zip(torch.load(file), expected, strict=True):
        assert relative_error(out, reference) < 1e-5


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
    monkeypatch.setattr(resized_conv, "HAS_TRITON", False)
    assert relative_error(kernel, conv3x3_of_resized(maps, weight, bias)) < 1e-5


# ------------------------------------------------------------------------------------------- the head


@pytest.mark.filterwarnings("ignore:When align_corners=True")
@settings(max_examples=40)
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    batch=st.integers(1, 2),
    align_corners=st.booleans(),
    norm_cfg=st.sampled_from([dict(type="BN"), dict(type="GN", num_groups=2), None]),
    act_cfg=st.sampled_from([dict(type="ReLU"), dict(type="GELU"), None]),
)
def test_head_equals_mmsegs(height, width, batch, align_corners, norm_cfg, act_cfg):
    options = dict(align_corners=align_corners, norm_cfg=norm_cfg, act_cfg=act_cfg)
    cheap, reference = head(**options), head("UPerHead", **options)
    assert type(reference) is UPerHead
    reference.load_state_dict(cheap.state_dict())  # the same names: official checkpoints load as before
    inputs = pyramid(height, width, batch)
    with torch.no_grad():
        assert relative_error(cheap(inputs), reference(inputs)) < 1e-4


def test_head_at_odd_sizes_reads_the_maps_that_are_selected():
    inputs = [torch.randn(1, 99, 2, 2), *pyramid(127, 95)]
    cheap, reference = head(), head("UPerHead")
    for model in (cheap, reference):
        model.in_index = [1, 2, 3, 4]
    with torch.no_grad():
        assert relative_error(cheap(inputs), reference(inputs)) < 1e-4


@pytest.mark.parametrize(
    "inference, gradients, training, expected",
    [("cheap", False, False, 1), ("plain", False, False, 0), ("cheap", True, False, 0), ("cheap", False, True, 0)],
)
def test_which_computation_runs(cheap_calls, inference, gradients, training, expected):
    model = head(inference=inference).train(training)
    with torch.set_grad_enabled(gradients):
        model(pyramid(16, 16, batch=2))
    assert len(cheap_calls) == expected


@pytest.mark.parametrize("training", [True, False])  # the short fine-tune leaves heads in eval mode
def test_gradients_are_those_of_mmsegs_head(training):
    inputs = [x.requires_grad_() for x in pyramid(16, 12, batch=2)]
    gradients = []
    for kind in ("FastUPerHead", "UPerHead"):
        model = head(kind, dropout_ratio=0).train(training)
        logits = model(inputs)
        gradients.append(torch.autograd.grad(logits.square().sum(), [*inputs, *model.parameters()]))
    for ours, theirs in zip(*gradients):
        assert torch.equal(ours, theirs)


def changed_by_loading(model):
    model.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def changed_by_a_training_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(pyramid(16, 12, batch=2)).square().mean().backward()
    optimizer.step()
    model.eval()


def changed_behind_autograds_back(model):  # as mmengine's EMAHook swaps weights
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.flip(0))


@pytest.mark.parametrize("change", [changed_by_loading, changed_by_a_training_step, changed_behind_autograds_back])
def test_weights_are_never_stale(change):
    model, inputs = head(), pyramid(16, 12)
    with torch.no_grad():
        before = model(inputs)
    change(model)
    with torch.no_grad():
        after = model(inputs)
        model.inference = "plain"
        assert relative_error(after, model(inputs)) < 1e-4
    assert relative_error(after, before) > 1e-2
    with torch.no_grad():
        model.inference = "cheap"
        assert relative_error(model.double()([x.double() for x in inputs]), after.double()) < 1e-4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="inference is 'fast'; choose 'cheap' or 'plain'"):
        head(inference="fast")
    deformable = dict(type="Conv2dAdaptivePadding")
    with pytest.raises(ValueError, match=r"no ordinary convolution; set decode_head.inference='plain'"):
        head(conv_cfg=deformable)
    head(conv_cfg=deformable, inference="plain")


# ------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_the_cheap_head_and_its_module(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    model = cfg.model.module if cfg.model.type == "SegTTAModel" else cfg.model
    assert model.decode_head.type == "FastUPerHead" and model.decode_head.inference == "cheap"
    assert upernet.__name__ in cfg.custom_imports.imports


def flops(function) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_arithmetic_of_the_large_head_at_512_pixels():
    """Multiply-adds times two, counted by PyTorch on tensors without data."""
    sizes = [(128, 128), (64, 64), (32, 32), (16, 16)]
    with torch.device("meta"):
        maps = [torch.empty(1, 1024, *size) for size in sizes]
        weight = torch.empty(1024, 4096, 3, 3)
    full = flops(lambda: F.conv2d(maps[0], weight[:, :1024], padding=1))
    plain = flops(lambda: plain_conv(maps, weight, None, False))
    cheap = flops(lambda: conv3x3_of_resized(maps, weight))
    products = sum(flops(lambda x=x: F.conv2d(x, weight[:, :1024], padding=1)) for x in maps[1:])
    assert plain == pytest.approx(1.24e12, rel=0.01)
    assert plain - full == pytest.approx(0.93e12, rel=0.01)
    assert products == pytest.approx(0.10e12, rel=0.02)
    assert cheap - full < 1.3 * products  # the sums over shifts come on top

    cfg = Config.fromfile(CONFIGS / "eva02_l_dense_512.py", import_custom_modules=False).model.decode_head
    init_default_scope("mmseg")
    whole = {}
    for inference in ("cheap", "plain"):
        with torch.device("meta"):
            model = MODELS.build({**cfg, "inference": inference, "norm_cfg": dict(type="BN")}).eval()
        whole[inference] = flops(lambda model=model: model(maps))
    assert whole["cheap"] < 0.55 * whole["plain"]


@pytest.mark.filterwarnings("ignore:For binary segmentation")
def test_shipped_model_gives_the_same_logits_and_labels():
    path = CONFIGS / "eva02_tiny_apt_photoshapes.py"
    cfg = Config.fromfile(path)
    init_default_scope("mmseg")
    logits = {}
    images = F.interpolate(torch.randn(2, 3, 11, 13), (101, 120), mode="bicubic")
    metas = [dict(ori_shape=(101, 120), img_shape=(101, 120))] * 2
    for inference in ("cheap", "plain"):
        cfg.model.decode_head.inference = inference
        model = MODELS.build(cfg.model).eval()
        load_converted(model, read_checkpoint(CONFIGS / "checkpoints" / "eva02_tiny_dense_photoshapes.safetensors"))
        with torch.no_grad():
            logits[inference] = model.slide_inference(images, metas)
    assert relative_error(logits["cheap"], logits["plain"]) < 1e-4
    assert (logits["cheap"].argmax(1) == logits["plain"].argmax(1)).float().mean() > 0.9999
