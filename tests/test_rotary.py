"""Rotary positions at patch centers and corners, in image and in window coordinates; and timm's of every kind."""

from itertools import product

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, apply_rot_embed_cat

from apt_backbones import PatchLayout, apply_rotary, rotary_table
from apt_backbones.backbones.timm_rotary import rotation_angles
from apt_backbones.rotary import token_positions

OFFSETS, ORDERS = (0.0, 0.25), ("ij", "xy")


def test_equals_timm_without_merging():
    height, width, head_dim = 5, 7, 16
    x = torch.randn(height * width, 2, head_dim)
    layout = PatchLayout.dense(1, (height, width), 16)
    ours = apply_rotary(x, rotary_table(layout, head_dim, length=8))
    timm_rope = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=(8, 8), ref_feat_shape=(16, 16))
    table = timm_rope.get_embed().view(8, 8, -1)[:height, :width].flatten(0, 1)
    theirs = apply_rot_embed_cat(x.transpose(0, 1)[None], table)[0].transpose(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def assert_angles_are_timms(rope, half):
    grid = (3, 5)
    torch.manual_seed(0)
    expected = rope.get_embed(grid)
    torch.manual_seed(0)
    found = rotation_angles(rope, token_positions(PatchLayout.dense(1, grid, 16)), grid)[:, 0]
    for timms, ours in zip(expected.chunk(2, -1), (found.sin(), found.cos())):
        timms = timms[:, : ours.shape[1]] if half else timms[:, ::2]
        torch.testing.assert_close(ours, timms, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset, order, reference", product(OFFSETS, ORDERS, (None, [4, 7])))
def test_angles_of_cat_rotations_are_timms(offset, order, reference):
    rope = RotaryEmbeddingCat(16, in_pixels=False, ref_feat_shape=reference, grid_offset=offset, grid_indexing=order)
    assert_angles_are_timms(rope, half=False)


@pytest.mark.parametrize("offset, order, over", product(OFFSETS, ORDERS, ("max", "min", "separate")))
def test_angles_of_dinov3_are_timms(offset, order, over):
    rope = RotaryEmbeddingDinoV3(16, grid_offset=offset, grid_indexing=order, normalize_coords=over)
    assert_angles_are_timms(rope, half=True)


def test_positions_are_augmented_in_training_as_timm_does_it():
    rope = RotaryEmbeddingDinoV3(16, shift_coords=0.5, jitter_coords=1.5, rescale_coords=2.0).train()
    assert_angles_are_timms(rope, half=True)


def angles(layout, **options):
    """The positions themselves: angles of the fastest channels of the row half and of the column half."""
    table = rotary_table(layout, 8, length=16, **options)  # 16 cells span 16 units: the angle is the cell's
    return table.angle()[:, 0, [0, 2]]


def test_a_merged_patch_sits_at_its_center_or_at_its_corner():
    sides = torch.full((1, 3, 3), 16)
    sides[0, :2, :2] = 32
    layout = PatchLayout.build(sides, 16, (32,))
    center = angles(layout)
    torch.testing.assert_close(center, torch.tensor([[0.5, 0.5], [0, 2], [1, 2], [2, 0], [2, 1], [2, 2]]))
    corner = angles(layout, rope_position="corner")
    torch.testing.assert_close(corner[0], torch.zeros(2))
    assert torch.equal(corner[1:], center[1:]), "base patches sit where they are, either way"


def test_window_coordinates_start_anew_in_every_window():
    layout = PatchLayout.dense(1, (4, 4), 16, window=2)
    one_window = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(angles(layout, within_window=True), one_window.repeat(4, 1))
    torch.testing.assert_close(angles(layout)[-1], torch.tensor([3.0, 3.0]))


def test_prefix_tokens_are_not_rotated():
    layout = PatchLayout.dense(2, (2, 2), 16, num_prefix=1)
    x = torch.randn(layout.num_tokens, 1, 8)
    rotated = apply_rotary(x, rotary_table(layout, 8, length=2))
    is_prefix = layout.is_prefix_T
    assert torch.equal(rotated[is_prefix], x[is_prefix])
    assert not torch.allclose(rotated[~is_prefix], x[~is_prefix])


def test_rotation_is_computed_in_float32_and_keeps_the_dtype():
    layout = PatchLayout.dense(1, (4, 4), 16)
    table = rotary_table(layout, 8, length=4)
    x = torch.randn(16, 2, 8).bfloat16()
    assert torch.equal(apply_rotary(x, table), apply_rotary(x.float(), table).bfloat16())
