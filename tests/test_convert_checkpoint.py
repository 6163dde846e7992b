"""tools/convert_checkpoint.py: every entry is accounted for, and DST is whole or not there."""

import pytest
import torch

from tools.cli import run
from apt_backbones import read_checkpoint
from tests.golden import load_golden
from tools import convert_checkpoint


@pytest.fixture
def original(tmp_path):
    """What an original file holds: the network, buffers that we compute, and training state beside it."""
    weights = dict(load_golden("eva02_cascade_tiny").weights)
    buffers = {name: t for name, t in load_golden("eva02_det_tiny").weights.items() if "freqs" in name}
    buffers |= {
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "pixel_mean": torch.ones(3, 1, 1),
    }
    torch.save({"model": {**weights, **buffers}, "iteration": 7}, tmp_path / "original.pth")
    return tmp_path / "original.pth", weights, buffers


def main(*arguments):
    run(lambda: convert_checkpoint.main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_entry_is_used_or_named_as_dropped(original, tmp_path, suffix, capsys):
    source, weights, buffers = original
    target = tmp_path / "new" / f"ours.{suffix}"
    main("eva02-det", source, target)
    printed = capsys.readouterr().out
    assert f"{len(weights) + len(buffers)} entries read, {len(weights)} used, {len(buffers)} dropped" in printed
    for name in buffers:
        assert f"dropped  {name} " in printed
    ours = read_checkpoint(target)
    assert len(ours) == len(weights)
    assert ours["roi_head.mask_head.convs.3.ln.bias"].equal(weights["roi_heads.mask_head.mask_fcn4.norm.bias"])
    assert ours["backbone.pos_embed"].equal(weights["backbone.net.pos_embed"][:, 1:]), "the CLS position is cut off"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_checkpoint_of_mmseg_0x_is_converted(tmp_path, capsys):
    weights = load_golden("eva02_seg_tiny").weights
    torch.save({"meta": {"mmseg_version": "0.29.1"}, "state_dict": weights}, tmp_path / "official.pth")
    main("eva02-seg", tmp_path / "official.pth", tmp_path / "ours.pth")
    assert f"{sum('rope' in name for name in weights)} dropped" in capsys.readouterr().out
    ours = read_checkpoint(tmp_path / "ours.pth")
    assert ours["neck.upsample_2x.0.weight"].equal(weights["backbone.fpn2.0.weight"])


@pytest.mark.parametrize("kind", ["det", "seg"])
def test_nothing_is_written_if_an_entry_is_unknown(tmp_path, kind):
    torch.save({"model": {"backbone.bottom_up.res2.0.conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    with pytest.raises(SystemExit, match=rf"error: not an EVA-02 {kind} checkpoint: 1 entries .*res2"):
        main(f"eva02-{kind}", tmp_path / "resnet.pth", tmp_path / "ours.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["resnet.pth"]


def test_an_existing_file_is_kept_unless_forced(original, tmp_path):
    target = tmp_path / "ours.safetensors"
    target.write_text("mine")
    with pytest.raises(SystemExit, match="exists; choose another name or add --force"):
        main("eva02-det", original[0], target)
    assert target.read_text() == "mine"
    main("eva02-det", original[0], target, "--force")
    assert read_checkpoint(target)


@pytest.mark.parametrize("name", ["missing.pth", "text.pth"])
def test_unreadable_sources_are_reported_in_one_line(name, tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(SystemExit, match=f"error: .*{name}") as error:
        main("eva02-det", tmp_path / name, tmp_path / "ours.pth")
    assert "\n" not in str(error.value)
