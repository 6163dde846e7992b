"""What merging a patch loses: of an output per cell how much it differs, of a whole image's how much it changes."""

import math
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F

from apt_backbones import adapt
from apt_backbones.distance import merging_off
from apt_backbones.merging_losses import Prototypes, cell_losses, image_losses, merging_losses, smaller_image_losses
from tests.scripts import ROOT
from tools.distill_scorer import losses_of
from tools.frozen_model import frozen_model

SIZES = (8, 16)


def test_losses_are_divergences():
    same = torch.full((1, 4, 2, 2), 0.25)
    apart = torch.eye(4).view(1, 4, 2, 2)
    assert float(merging_losses(same, (2,))[0]) == pytest.approx(0, abs=1e-6)
    assert float(merging_losses(apart, (2,))[0]) == pytest.approx(torch.tensor(4.0).log().item())
    alike = torch.rand(4, 21, 1, 1).softmax(1).expand(-1, -1, 8, 8)
    assert all((loss >= 0).all() for loss in merging_losses(alike, (2, 4, 8))), "whatever rounding does"


def test_an_output_of_any_resolution_is_averaged_over_cells():
    images = torch.rand(2, 3, 32, 48) * 255
    finer = cell_losses(lambda pixels: F.avg_pool2d(pixels, 2).softmax(1), SIZES)(images)
    of_cells = F.avg_pool2d(F.avg_pool2d(images, 2).softmax(1), 2)
    for found, expected, size in zip(finer, merging_losses(of_cells, (2, 4)), SIZES):
        assert found.shape == (2, 32 // size, 48 // size)
        torch.testing.assert_close(found, expected)


def test_read_at_its_own_resolution_a_patch_loses_what_the_smaller_image_does_not_say():
    """A checkerboard of single pixels is gone in an image of half the size, one of 2 x 2 pixels in one of a quarter."""
    classes = torch.zeros(1, 32, 32)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    classes[0, :16, :16] = (rows + columns) % 2
    classes[0, 16:, 16:] = (rows // 2 + columns // 2) % 2
    images = (255 * classes[:, None]).expand(-1, 3, -1, -1)

    def outputs(pixels):
        share = pixels[:, :1] / 255
        return torch.cat([share, 1 - share], 1)

    half, quarter = smaller_image_losses(outputs, SIZES)(images)
    assert half.shape == (1, 4, 4) and quarter.shape == (1, 2, 2)
    torch.testing.assert_close(half[0, :2, :2], torch.full((2, 2), math.log(2)), rtol=0.05, atol=0)
    assert (half[0, 0, 3], half[0, 3, 0]) == (0, 0) and half[0, 2:, 2:].max() < 0.7 * math.log(2)
    torch.testing.assert_close(quarter[0].diag(), torch.full((2,), math.log(2)), rtol=0.05, atol=0)
    assert quarter[0, 0, 1] < 0.05, "what the plain quarter gets from its neighbours"


@pytest.mark.parametrize("own_resolution", [False, True])
def test_what_a_segmenters_scorer_learns_is_what_its_way_of_reading_loses(own_resolution, tmp_path):
    base = ROOT / "seg_configs/eva02_tiny_resizing_photoshapes.py"
    (tmp_path / "config.py").write_text(f"_base_ = {str(base)!r}\nmodel = dict(own_resolution={own_resolution})\n")
    weights = str(ROOT / "seg_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors")
    frozen = frozen_model(str(tmp_path / "config.py"), weights, None)
    sizes, images = tuple(frozen.trunk.thresholds), (torch.rand(2, 3, 64, 64) * 255).round()

    def outputs(pixels):
        with merging_off(frozen.trunk):
            return frozen.head(frozen.normalized(pixels))

    expected = (smaller_image_losses if own_resolution else cell_losses)(outputs, sizes)(images)
    torch.testing.assert_close(losses_of(frozen, "head", None, [], 0)(images), expected)


def test_prototypes_tell_clusters_apart():
    centers = torch.randn(3, 6) * 5
    kinds = torch.randint(3, (4, 8, 8))
    maps = (centers[kinds] + 0.1 * torch.randn(4, 8, 8, 6)).permute(0, 3, 1, 2)
    probabilities = Prototypes.fit([maps], 3)(maps)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4, 8, 8))
    assert {len(probabilities.argmax(1)[kinds == kind].unique()) for kind in range(3)} == {1}


def network(kind: str, size: int = 56):
    """A small ViT of one of timm's two classes that says something different of different images."""
    torch.manual_seed(0)
    options = dict(depth=2, embed_dim=24, num_heads=2, num_classes=0, img_size=size, dynamic_img_size=True)
    vit = timm.create_model(kind, **options).eval()
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit


def with_means(vit, say, images, size, row, column, share):
    """What ``vit`` says if a patch's tokens, with their positions, move by a share towards their mean; in float64."""
    vit, images = deepcopy(vit).double(), images.double()
    side = images.shape[3] // vit.patch_embed.patch_size[0]
    factor = size // vit.patch_embed.patch_size[0]

    def move(module, inputs):
        (x_BND,) = inputs
        cells = x_BND[:, -side * side :].unflatten(1, (side, side)).clone()
        patch = cells[:, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        patch += share * (patch.mean((1, 2), keepdim=True) - patch)
        return torch.cat([x_BND[:, : -side * side], cells.flatten(1, 2)], 1)

    before = vit.norm_pre.register_forward_pre_hook(move)
    try:
        return say(vit(images))
    finally:
        before.remove()


@pytest.mark.parametrize("kind", ["features", "probabilities"])
def test_losses_depend_on_the_images_alone(kind):
    """Not on what was drawn before: an interrupted run goes on with the same losses."""
    vit = adapt(network("vit_small_patch14_dinov2", 56), {28: 0.5}, merge="resizing", padding="coarsest")
    losses = image_losses(vit, lambda pixels: vit(pixels).softmax(1), (28,), kind)
    images = 255 * torch.rand(3, 2, 3, 56, 56)
    (first,), (other,) = losses(images[0]), losses(images[1])
    torch.rand(7)
    assert torch.equal(losses(images[0])[0], first) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [28, 56])
def test_of_a_whole_image_it_is_the_first_order_of_what_changes(kind, size):
    vit, images = network(kind, 112), torch.randn(2, 3, 112, 112)

    def say(features):
        return 3 * features[:, :1]  # of one channel every projection is the same, up to its sign

    with torch.no_grad():
        change = with_means(vit, say, images, size, 1, 0, 1e-4) - with_means(vit, say, images, size, 1, 0, 0)
    expected = (change[:, 0] / 1e-4).square().float()
    adapt(vit, {28: 0.5, 56: 0.5}, merge="resizing", padding="coarsest")
    found = image_losses(vit, lambda pixels: say(vit(pixels)), (28, 56))(images)
    assert [part.shape for part in found] == [(2, 4, 4), (2, 2, 2)]
    torch.testing.assert_close(found[(28, 56).index(size)][:, 1, 0], expected, rtol=1e-2, atol=0)
    assert vit.thresholds == {28: 0.5, 56: 0.5}, "as before"
    assert vit.adaptive_embed(images, vit.layout(images), vit.projection(), None).grad_fn is not None, (
        "no leaf any more"
    )


def test_over_many_draws_it_is_a_squared_distance_or_a_divergence():
    vit, images = network("vit_small_patch14_dinov2"), torch.randn(1, 3, 56, 56)
    weight = torch.randn(3, 24) / 5

    def say(features):
        return F.linear(features, weight.to(features)).softmax(1)

    with torch.no_grad():
        dense, moved = (with_means(vit, say, images, 28, 1, 0, share) for share in (0, 1e-4))
    distance = float((moved - dense).square().sum()) / 1e-8
    divergence = float((dense * (dense / moved).log()).sum()) / 1e-8
    adapt(vit, {28: 0.0}, merge="resizing")
    for kind, expected in (("features", distance), ("probabilities", 2 * divergence)):
        torch.manual_seed(0)
        (found,) = image_losses(vit, lambda pixels: say(vit(pixels)), (28,), kind, draws=2000)(images)
        assert float(found[0, 1, 0]) == pytest.approx(expected, rel=0.1), kind


def test_edges_that_hold_no_whole_patch_have_no_loss():
    vit = adapt(network("vit_small_patch14_dinov2"), {28: 0.0}, merge="resizing")
    (found,) = image_losses(vit, vit, (28,))(torch.randn(1, 3, 70, 42))
    assert found.shape == (1, 2, 1) and (found > 0).all()
