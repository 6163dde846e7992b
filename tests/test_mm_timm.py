"""timm models as backbones of mmdet and mmseg: named in a config, loaded safely, trained and counted as the others."""

import copy

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from apt_backbones import find_trunk, freeze_host, load_converted
from apt_backbones.distance import merging_off
from apt_backbones.freeze import is_new
from apt_backbones.mm.optimizer import layer_of
from apt_backbones.new_layers import save_new_layers
from tests.golden import relative_error
from tests.scripts import ROOT
from tools.frozen_model import frozen_model
from tools.patch_settings import settings_of

SMALL = dict(type="APTTimm", model="vit_small_patch16_dinov3", img_size=128, out_indices=(5, -1))


def images(batch=1, height=96, width=128):
    picture = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    picture[..., : width // 2] = 0.1
    return picture


def backbone(**options):
    torch.manual_seed(0)
    model = MODELS.build({**SMALL, **options})
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        dict(norm=True),
        dict(norm=False),
        dict(keep_prefix=False),
        dict(model="vit_pe_core_tiny_patch16_384"),  # which pools by attention
        dict(out_indices=(3,), thresholds={32: 5.0}, adapter_rank=2),
    ],
)
def test_all_that_trains_gets_a_gradient(options):
    """Or else processes that train together would refuse the second iteration."""
    model = backbone(**options).train()
    sum(maps.square().mean() for maps in model(images())).backward()
    assert [name for name, part in model.named_parameters() if part.requires_grad and part.grad is None] == []
    freeze_host(model) if "thresholds" in options else None
    assert all(part.grad is not None for part in model.parameters() if part.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("model", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_maps_are_timms(tmp_path, model, norm):
    host = timm.create_model(model, img_size=112, dynamic_img_size=True).eval()
    for parameter in host.parameters():
        nn.init.normal_(parameter, 0.02, 0.05)
    save_file(host.state_dict(), tmp_path / "weights.safetensors")
    ours = backbone(model=model, img_size=112, norm=norm, checkpoint=str(tmp_path / "weights.safetensors"))
    patch = ours.trunk.patch_size
    picture = images(2, 6 * patch, 8 * patch)
    expected = host.forward_intermediates(picture, indices=[5, 11], norm=norm, intermediates_only=True)
    for own, timms in zip(ours(picture), expected):
        assert relative_error(own, timms) <= 1e-5


@torch.no_grad()
def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path):
    host = timm.create_model("vit_small_patch14_dinov2", img_size=518)
    nn.init.normal_(host.pos_embed)
    save_file(host.state_dict(), tmp_path / "weights.safetensors")
    ours = backbone(model="vit_small_patch14_dinov2", img_size=112, checkpoint=str(tmp_path / "weights.safetensors"))
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=112)
    timm.models.load_checkpoint(theirs, tmp_path / "weights.safetensors", filter_fn=checkpoint_filter_fn)
    torch.testing.assert_close(ours.trunk.pos_embed, theirs.pos_embed)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"of another model: .*missing"):
        backbone(checkpoint=str(tmp_path / "weights.safetensors"))


def test_learned_maps_start_from_a_dense_checkpoint(tmp_path):
    """One new layer per map; only these train."""
    save_file(timm.create_model(SMALL["model"], num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    options = dict(checkpoint=str(tmp_path / "weights.safetensors"), thresholds={32: 5.0}, merge="resizing")
    learned, interpolated = (backbone(map_fill=fill, **options) for fill in ("learned", "interpolate"))
    for ours, start in zip(learned(images()), interpolated(images())):
        torch.testing.assert_close(ours, start)
    freeze_host(learned)
    trained = {name.split(".out.")[0] for name, p in learned.named_parameters() if p.requires_grad and ".out." in name}
    assert trained == {"trunk.map_detail.5", "trunk.map_detail.11"}


@torch.no_grad()
@pytest.mark.parametrize("keep_prefix", [True, False])
def test_windows_with_and_without_prefix_tokens(keep_prefix):
    """CLS and registers stay out, as in ViTDet, or attend among themselves in windowed blocks."""
    options = dict(window_size=4, global_blocks=(2, 5, 8, 11), keep_prefix=keep_prefix)
    dense, adaptive = backbone(**options), backbone(thresholds={32: 5.0, 64: 5.0}, **options)
    nothing_merged = backbone(thresholds={32: 0.0, 64: 0.0}, **options)
    picture = images(2)
    for ours, theirs in zip(nothing_merged(picture), dense(picture)):
        assert relative_error(ours, theirs) <= 1e-5
    maps = adaptive(picture)
    assert all(m.shape == (2, 384, 6, 8) and m.isfinite().all() for m in maps)
    layout = adaptive.trunk.last_layout
    assert layout.num_prefix == (5 if keep_prefix else 0) and max(layout.num_patches) < 48
    assert relative_error(adaptive(picture[:1])[-1], maps[-1][:1]) <= 1e-5


def test_short_fine_tune_copies_and_layer_decay():
    model = freeze_host(backbone(thresholds={32: 5.0}, with_cp=True)).train()
    sum(m.square().mean() for m in model(images())).backward()
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"conv_down", "zero_mlp"}
    twin = copy.deepcopy(model)
    twin.eval()
    assert not twin.training and model.training, "a copy has a train method of its own"
    assert find_trunk(model) is model.trunk
    names = {"trunk.reg_token": 0, "trunk.patch_embed.proj.bias": 0, "trunk.blocks.3.norm1.weight": 4}
    names |= {"trunk.adaptive_embed.zero_mlp.bias": 13, "trunk.norm.weight": 13}
    parameters = dict(model.named_parameters())
    for name, layer in names.items():
        assert name in parameters and layer_of(name, "trunk", 12) == layer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["APTTimm", "APTEva02"])
def test_new_layers_of_a_file_go_with_a_dense_checkpoint(kind, tmp_path):
    """They are there when the backbone is built, and stay when weights without them are loaded."""
    if kind == "APTTimm":
        options = dict(SMALL, thresholds={32: 5.0}, map_fill="learned", adapter_rank=2)
    else:
        options = dict(
            type=kind, img_size=128, embed_dim=48, depth=2, num_heads=3, thresholds={32: 5.0}, adapter_rank=2
        )
    trained = MODELS.build(options)
    for name, parameter in trained.named_parameters():
        if is_new(name):
            nn.init.normal_(parameter)
    save_new_layers(trained, tmp_path / "new_layers.safetensors")
    model = nn.ModuleDict(
        {"backbone": MODELS.build({**options, "new_layers": str(tmp_path / "new_layers.safetensors")})}
    )
    dense = {f"backbone.{k}": v for k, v in trained.state_dict().items() if not is_new(k)}
    model["backbone"].init_weights()
    load_converted(model, dense)
    assert all(
        torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model["backbone"].state_dict().items()
    )
    with pytest.raises(ValueError, match="those of the file are a model's with merge='apt', adapter_rank=2"):
        MODELS.build({**options, "adapter_rank": 0, "new_layers": str(tmp_path / "new_layers.safetensors")})
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        MODELS.build({**options, "new_layers": "none.safetensors"})


@torch.no_grad()
@pytest.mark.parametrize(
    "config, patch",
    [("dinov2_s_linear_resizing_camvid", 14), ("dinov2_s_apt_512", 14), ("dinov3_b_linear_apt_512", 16)],
)
def test_tools_know_the_patches_that_a_configuration_leaves_to_timm(config, patch):
    settings = settings_of(f"{ROOT}/seg_configs/{config}.py")
    assert settings.patch_size == patch and list(settings.thresholds) == [2 * patch]


@torch.no_grad()
def test_a_frozen_segmenters_features_are_what_its_head_reads(tmp_path):
    """After the final norm, which its configuration asks for; and its probabilities are mmseg's."""
    config = f"{ROOT}/seg_configs/dinov2_s_linear_resizing_camvid.py"
    cfg = Config.fromfile(config)
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model).eval()
    nn.init.normal_(model.backbone.trunk.norm.weight)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    frozen = frozen_model(config, str(tmp_path / "weights.safetensors"), None)
    frozen.trunk.thresholds = model.backbone.trunk.thresholds = {}
    picture = images(1, 112, 140)
    expected = model.backbone(picture)
    torch.testing.assert_close(frozen.features(picture), torch.cat(expected, 1))
    logits = model.decode_head.forward(expected)
    logits = nn.functional.interpolate(logits, (112, 140), mode="bilinear", align_corners=False)
    torch.testing.assert_close(frozen.head(picture), logits.softmax(1))
    assert frozen.settings.prepare(Image.new("RGB", (480, 360))).size == (448, 336)


@torch.no_grad()
def test_features_can_be_learned_from_before_there_is_a_head(tmp_path):
    """Those of the weights that the backbone's configuration names."""
    base, weights = f"{ROOT}/seg_configs/dinov2_s_linear_resizing_camvid.py", tmp_path / "trunk.safetensors"
    trunk = MODELS.build(Config.fromfile(base).model.backbone).trunk
    nn.init.normal_(trunk.norm.weight)
    save_file(trunk.state_dict(), weights)
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = {base!r}\nmodel = dict(backbone=dict(checkpoint={str(weights)!r}))\n")
    frozen, picture = frozen_model(str(config), None, None), images(1, 112, 140)
    with merging_off(frozen.trunk), merging_off(trunk):
        expected = trunk.feature_maps(picture, norm=True)
        torch.testing.assert_close(frozen.features(picture), torch.cat(expected, 1))
    assert frozen.target(None) == "features"
    with pytest.raises(ValueError, match="no --weights of it are given; use --target features"):
        frozen.target("head")
    config.write_text(f"_base_ = {base!r}\nmodel = dict(backbone=dict(checkpoint=None))\n")
    with pytest.raises(ValueError, match=r"config\.py names no weights of its backbone; give those of the model"):
        frozen_model(str(config), None, None)
