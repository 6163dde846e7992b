"""Reading, converting and loading weights: exact accounting of names, and nothing executed."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from apt_backbones import APTEva02, convert_eva02, load_converted, read_checkpoint
from apt_backbones.checkpoint import load_pretrained
from tests.golden import load_golden

TRUNKS = {
    "det": {k: v for k, v in load_golden("eva02_det_tiny").weights.items() if k.startswith("backbone.net.")},
    "seg": {k: v for k, v in load_golden("eva02_seg_tiny").weights.items() if ".fpn" not in k},
}
MODELS = {
    "det": dict(img_size=128, pretrain_img_size=64, window_size=4, global_blocks=(1, 3)),
    "seg": dict(img_size=96, pretrain_img_size=96, use_cls_token=True),
}


def trunk(kind, **options):
    return torch.nn.ModuleDict({"backbone": APTEva02(embed_dim=48, depth=4, num_heads=3, **MODELS[kind], **options)})


@pytest.mark.parametrize("kind", ["det", "seg"])
def test_every_original_trunk_key_is_used_or_a_buffer_that_we_compute(kind):
    model = trunk(kind)
    converted = convert_eva02(TRUNKS[kind], kind)
    load_converted(model, converted)  # strict: nothing missing, nothing unknown
    learned = [name for name in TRUNKS[kind] if "rope" not in name]
    assert len(converted) == len(learned)


def test_only_the_new_layers_may_be_missing():
    model = trunk("det", thresholds={32: 2.0})
    before = model["backbone"].adaptive_embed.conv_down.weight.clone()
    load_converted(model, convert_eva02(TRUNKS["det"], "det"))
    assert torch.equal(model["backbone"].adaptive_embed.conv_down.weight, before)
    incomplete = convert_eva02(TRUNKS["det"], "det")
    del incomplete["backbone.blocks.2.mlp.fc2.weight"]
    with pytest.raises(ValueError, match=r"1 entries \(backbone.blocks.2.mlp.fc2.weight\) missing"):
        load_converted(model, incomplete)


def test_a_checkpoint_of_another_model_is_refused_and_the_model_unchanged():
    weights = convert_eva02(TRUNKS["det"], "det")
    narrow = torch.nn.ModuleDict({"backbone": APTEva02(img_size=128, embed_dim=24, depth=5, num_heads=3)})
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    with pytest.raises(ValueError, match=r"backbone.blocks.4.*missing.*\(48,\) instead of \(24,\).*another shape"):
        load_converted(narrow, weights)
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())


@pytest.mark.parametrize("kind, other", [("det", "seg"), ("seg", "det")])
def test_the_other_kind_of_checkpoint_is_refused(kind, other):
    with pytest.raises(ValueError, match=f"not an EVA-02 {kind} checkpoint"):
        convert_eva02(TRUNKS[other], kind)


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"1 entries \(backbone.surprise.weight\) unknown"):
        convert_eva02({**TRUNKS["seg"], "backbone.surprise.weight": torch.zeros(1)}, "seg")
    with pytest.raises(ValueError, match="choose one of det, seg"):
        convert_eva02({}, "classification")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"state_dict": w}])
def test_files_are_read_whatever_they_wrap_the_weights_in(tmp_path, wrap):
    weights = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    torch.save(wrap(weights), tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        read = read_checkpoint(tmp_path / name)
        assert read.keys() == weights.keys() and all(torch.equal(read[k], weights[k]) for k in weights)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["APT_TEST_TRAP"],)


def test_code_in_a_checkpoint_is_refused_not_executed(tmp_path, monkeypatch):
    trap = tmp_path / "executed"
    monkeypatch.setenv("APT_TEST_TRAP", str(trap))
    torch.save({"model": {"w": torch.zeros(1)}, "hook": Malicious()}, tmp_path / "new.pth")
    with open(tmp_path / "old.pth", "wb") as file:
        pickle.dump({"model": Malicious()}, file)
    for name in ("new.pth", "old.pth"):
        with pytest.raises(ValueError, match="cannot be read safely as weights"):
            read_checkpoint(tmp_path / name)
    assert not trap.exists()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.pth"):
        read_checkpoint(tmp_path / "missing.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
        with pytest.raises(ValueError, match="cannot be read safely"):
            read_checkpoint(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        read_checkpoint(tmp_path / "empty.pth")


def test_positions_of_a_larger_pretraining_are_resampled_as_the_trunk_resamples_its_own():
    options = dict(img_size=64, embed_dim=48, depth=1, num_heads=3)
    large, small = (APTEva02(**options, pretrain_img_size=side) for side in (128, 64))
    load_pretrained(small, large.state_dict())
    own = (trunk.positions((4, 4))[..., :4, :4] for trunk in (small, large))  # more of them, for merged patches
    torch.testing.assert_close(*own)
