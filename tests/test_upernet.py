"""The fast UPerHead computes what mmseg's computes, with less arithmetic, and never from stale weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models import Feature2Pyramid, UPerHead
from mmseg.registry import MODELS
from torch import nn

from apt_backbones.mm import upernet
from apt_backbones.mm.resized_conv import conv3x3_of_resized
from apt_backbones.mm.upernet import Unfinished, unfinished_pyramid
from benchmarks.clock import count_gflops
from tests.golden import relative_error
from tests.test_seg_model import config

CONFIGS = Path(__file__).parents[1] / "seg_configs"


def head(kind="FastUPerHead", **kwargs) -> nn.Module:
    """A small head as after training: nothing is zero, one or equal by accident."""
    init_default_scope("mmseg")
    norm_cfg = kwargs.pop("norm_cfg", dict(type="BN"))
    options = dict(in_channels=[6, 5, 4, 7], in_index=[0, 1, 2, 3], channels=8, num_classes=5) | kwargs
    torch.manual_seed(1)
    model = MODELS.build(dict(type=kind, norm_cfg=norm_cfg, **options)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def pyramid(height, width, batch=1, **kwargs):
    """Maps as a neck gives them, each half as large as the one before: rounded down, where that is odd."""
    return [
        torch.randn(batch, channels, max(1, height >> level), max(1, width >> level), **kwargs)
        for level, channels in enumerate([6, 5, 4, 7])
    ]


@pytest.fixture
def fast_calls(monkeypatch):
    """How often the fast computation ran."""
    calls = []

    def counted(*args):
        calls.append(args)
        return conv3x3_of_resized(*args)

    monkeypatch.setattr(upernet, "conv3x3_of_resized", counted)
    return calls


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
    fast, reference = head(**options), head("UPerHead", **options)
    assert type(reference) is UPerHead
    reference.load_state_dict(fast.state_dict())  # the same names: official checkpoints load as before
    inputs = pyramid(height, width, batch)
    with torch.no_grad():
        assert relative_error(fast(inputs), reference(inputs)) < 1e-4


def test_head_at_odd_sizes_reads_the_maps_that_are_selected():
    inputs = [torch.randn(1, 99, 2, 2), *pyramid(127, 95)]
    fast, reference = head(), head("UPerHead")
    for model in (fast, reference):
        model.in_index = [1, 2, 3, 4]
    with torch.no_grad():
        assert relative_error(fast(inputs), reference(inputs)) < 1e-4


@pytest.mark.gpu
def test_head_on_a_gpu_equals_mmsegs(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    inputs = pyramid(127, 95, batch=2)
    with torch.no_grad():
        expected = head("UPerHead")(inputs)
        logits = head().cuda()([x.cuda() for x in inputs])
    assert relative_error(logits.cpu(), expected) < 1e-4


@pytest.mark.parametrize(
    "inference, gradients, training, expected",
    [("fast", False, False, 1), ("reference", False, False, 0), ("fast", True, False, 0), ("fast", False, True, 0)],
)
def test_which_computation_runs(fast_calls, inference, gradients, training, expected):
    model = head(inference=inference).train(training)
    with torch.set_grad_enabled(gradients):
        model(pyramid(16, 16, batch=2))
    assert len(fast_calls) == expected


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


@settings(max_examples=20)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    from_4x=st.booleans(),
    norm_cfg=st.sampled_from([dict(type="BN"), None]),
)
def test_levels_whose_last_layer_is_left_to_the_head_give_the_same(height, width, from_4x, norm_cfg):
    rescales = [4, 2, 1, 0.5] if from_4x else [2, 1, 0.5, 0.25]
    neck = Feature2Pyramid(6, rescales, norm_cfg=dict(type="BN")).eval()
    model = head(norm_cfg=norm_cfg, in_channels=[6, 6, 6, 6])
    least = 2 if from_4x else 4
    maps = torch.randn(4, 2, 6, least * height, least * width).unbind()
    with torch.no_grad():
        levels = unfinished_pyramid(neck, maps)
        assert sum(isinstance(level, Unfinished) for level in levels) == (2 if from_4x else 1)
        assert relative_error(model(levels), model(neck(maps))) < 1e-4
        model.in_index = [3, 2, 1, 0]  # the coarsest level unfinished
        assert relative_error(model(levels), model(neck(maps))) < 1e-4


def test_a_segmenter_leaves_the_last_layer_of_its_neck_to_the_fast_head_alone():
    cfg = config()
    cfg.decode_head.type = "FastUPerHead"
    model = MODELS.build(cfg).eval()
    maps = torch.randn(4, 1, 48, 8, 8).unbind()
    with torch.no_grad():
        fast, gflops = model.head_inputs(maps), {}
        for model.decode_head.inference in ("fast", "reference"):
            gflops[model.decode_head.inference] = count_gflops(lambda: model.decode_head(model.head_inputs(maps)))
        assert isinstance(fast[0], Unfinished) and gflops["fast"] < 0.6 * gflops["reference"]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.head_inputs(maps), model.neck(maps)))
    model.decode_head.inference = "fast"
    assert all(isinstance(level, torch.Tensor) for level in model.head_inputs(maps)), "with gradients"


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
        model.inference = "reference"
        assert relative_error(after, model(inputs)) < 1e-4
    assert relative_error(after, before) > 1e-2
    with torch.no_grad():
        model.inference = "fast"
        assert relative_error(model.double()([x.double() for x in inputs]), after.double()) < 1e-4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="inference is 'quick'; choose 'fast' or 'reference'"):
        head(inference="quick")
    adaptive = dict(type="Conv2dAdaptivePadding")
    with pytest.raises(ValueError, match=r"not an ordinary convolution; set decode_head.inference='reference'"):
        head(conv_cfg=adaptive)
    head(conv_cfg=adaptive, inference="reference")


# ------------------------------------------------------------------------------------------- the models


UPERNETS = [path for path in sorted(CONFIGS.glob("*.py")) if "linear" not in path.stem]


@pytest.mark.parametrize("path", UPERNETS, ids=lambda path: path.stem)
def test_every_config_has_the_fast_head_and_its_module(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    model = cfg.model.module if cfg.model.type == "SegTTAModel" else cfg.model
    assert model.decode_head.type == "FastUPerHead" and model.decode_head.inference == "fast"
    assert upernet.__name__ in cfg.custom_imports.imports


def test_the_large_head_at_512_pixels_has_half_the_arithmetic():
    with torch.device("meta"):
        maps = [torch.empty(1, 1024, 128 >> level, 128 >> level) for level in range(4)]
    cfg = Config.fromfile(CONFIGS / "eva02_l_dense_512.py", import_custom_modules=False).model.decode_head
    init_default_scope("mmseg")
    whole = {}
    for inference in ("fast", "reference"):
        with torch.device("meta"):
            model = MODELS.build({**cfg, "inference": inference, "norm_cfg": dict(type="BN")}).eval()
        with torch.no_grad():
            whole[inference] = count_gflops(lambda model=model: model(maps))
    assert whole["fast"] < 0.55 * whole["reference"]
