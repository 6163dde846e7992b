"""The embedding formula, patch by patch, and the two baselines."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apt_backbones import AdaptivePatchEmbed, PatchLayout, drop_at_random

DIM, PATCH = 6, 4


@pytest.fixture(params=["apt", "apt_random_init", "apt_residual"])
def case(request):
    """Two images of 8 x 12 cells with patches of three sizes, and a trained (non-zero) embedding."""
    sides = torch.full((2, 8, 12), PATCH)
    sides[0, 4:, 8:] = 4 * PATCH
    sides[0, :2, 2:4] = 2 * PATCH
    sides[1, :4, :4] = 4 * PATCH
    sides[1, 6:, 6:8] = 2 * PATCH
    layout = PatchLayout.build(sides, PATCH, (2 * PATCH, 4 * PATCH), window=4)
    embed = AdaptivePatchEmbed(DIM, request.param)
    for parameter in embed.zero_mlp.parameters():
        nn.init.normal_(parameter)
    proj = nn.Conv2d(3, DIM, PATCH, PATCH)
    return torch.randn(2, 3, 32, 48), layout, embed, proj, torch.randn(1, DIM, 12, 12)


def one_token(images, layout, embed, proj, positions, token):
    """The formula of section 3.1 for one patch, written as the paper writes it."""
    image, row, column, side = (int(x[token]) for x in (layout.image_T, layout.row_T, layout.column_T, layout.side_T))
    factor = side // PATCH
    patch = images[image : image + 1, :, row * PATCH :, column * PATCH :][:, :, :side, :side]
    value = proj(F.interpolate(patch, size=(PATCH, PATCH), mode="bilinear", align_corners=False)).flatten()
    if factor > 1:
        detail = proj(patch)  # E of every base sub-patch
        while detail.shape[-1] > 1:
            detail = embed.conv_down(detail)
        value = value + embed.zero_mlp(detail.flatten())
    grid = 12 // factor
    coarse = F.interpolate(positions, size=(grid, grid), mode="bicubic", antialias=True) if factor > 1 else positions
    return value + coarse[0, :, row // factor, column // factor]


def test_every_token_follows_the_formula(case):
    images, layout, embed, proj, positions = case
    tokens = embed(images, layout, proj, positions)
    expected = torch.stack([one_token(*case, token) for token in range(layout.num_tokens)])
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_positions_of_a_grid_that_no_large_patch_divides_stay_aligned():
    """A 3 x 3 square holds one 2 x 2 patch: its position is resampled from the cells it covers."""
    sides = torch.full((1, 3, 3), PATCH)
    sides[:, :2, :2] = 2 * PATCH
    layout = PatchLayout.build(sides, PATCH, (2 * PATCH,))
    positions = torch.zeros(1, DIM, 3, 3)
    positions[:, :, :2, :2] = 1.0
    proj = nn.Conv2d(3, DIM, PATCH, PATCH)
    images = torch.randn(1, 3, 12, 12)
    embed = AdaptivePatchEmbed(DIM)
    difference = embed(images, layout, proj, positions) - embed(images, layout, proj, None)
    torch.testing.assert_close(difference[0], torch.ones(DIM))
    torch.testing.assert_close(difference[1:], torch.zeros(5, DIM))


@pytest.mark.parametrize("occurs", [True, False])
def test_new_layers_get_a_gradient_whether_or_not_anything_merges(occurs):
    sides = torch.full((1, 4, 4), PATCH)
    if occurs:
        sides[:, :2, :2] = 2 * PATCH
    layout = PatchLayout.build(sides, PATCH, (2 * PATCH, 4 * PATCH))
    embed = AdaptivePatchEmbed(DIM)
    nn.init.normal_(embed.zero_mlp.weight)  # at zero it hides ConvDown's gradient, as intended at the start
    proj = nn.Conv2d(3, DIM, PATCH, PATCH).requires_grad_(False)
    embed(torch.randn(1, 3, 16, 16), layout, proj, None).square().sum().backward()
    for parameter in embed.parameters():
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) == occurs


def test_random_keeps_as_many_base_patches_as_the_selection_has_patches(case):
    _, layout, _, _, _ = case
    sides = layout.side_T[layout.token_BHW]
    dropped = drop_at_random(sides, PATCH)
    assert sorted(set(dropped.flatten().tolist())) == [0, PATCH]
    assert tuple((dropped > 0).sum((1, 2)).tolist()) == layout.num_patches
    assert torch.equal(drop_at_random(sides[1:], PATCH), dropped[1:]), "the same alone as in a batch"


def test_only_the_ablations_change_tokens_before_training(case):
    images, layout, _, proj, positions = case
    resizing = AdaptivePatchEmbed(DIM, "resizing")
    assert not list(resizing.parameters())
    resized = resizing(images, layout, proj, positions)
    is_merged = layout.side_T > PATCH
    for merge in ("apt", "apt_random_init", "apt_residual"):
        tokens = AdaptivePatchEmbed(DIM, merge)(images, layout, proj, positions)
        assert torch.equal(tokens[~is_merged], resized[~is_merged])
        assert torch.equal(tokens[is_merged], resized[is_merged]) == (merge == "apt")
