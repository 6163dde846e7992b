"""Feature error of merging."""

import pytest
import torch

from apt_backbones import APTEva02
from apt_backbones.distance import dense_features, feature_distance, merging_off

TRUNK = dict(img_size=64, patch_size=8, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=32, out_indices=(0, 1))


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return APTEva02(**TRUNK, thresholds={16: 3.0}).eval()


@pytest.fixture(scope="module")
def images():
    """Flat on the left, noise on the right: 4 x 2 merged patches, then single cells."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[..., :32] = 0.1
    return images


def test_a_trunk_without_merging_has_no_error(images):
    torch.manual_seed(0)
    trunk = APTEva02(**TRUNK, thresholds={16: 0.0}).eval()
    error = feature_distance(trunk, images)
    assert error.relative() == pytest.approx(0, abs=1e-6) and set(error.side_BHW.unique().tolist()) == {8}


def test_errors_are_distances_of_the_two_models_feature_maps(trunk, images):
    error = feature_distance(trunk, images)
    dense = APTEva02(**TRUNK).eval()
    dense.load_state_dict({k: v for k, v in trunk.state_dict().items() if "adaptive_embed" not in k})
    with torch.no_grad():
        pairs = list(zip(trunk(images), dense(images)))
    expected = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    assert error.relative() == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert error.side_BHW[:, :, :4].eq(16).all() and error.side_BHW[:, :, 4:].eq(8).all()


def test_errors_of_some_cells_and_the_heat_map_hang_together(trunk, images):
    error = feature_distance(trunk, images)
    merged = error.side_BHW > 8
    assert error.heat().shape == (2, 8, 8)
    assert error.heat()[merged].mean() > error.heat()[~merged].mean() > 0
    assert error.relative(merged) > error.relative() > error.relative(~merged)
    alone = feature_distance(trunk, images[1:])
    torch.testing.assert_close(alone.heat(), error.heat()[1:], atol=0, rtol=1e-4)


def test_dense_features_leave_the_trunk_adaptive(trunk, images):
    known = dense_features(trunk, images)
    assert trunk.thresholds == {16: 3.0}
    with pytest.raises(ZeroDivisionError), merging_off(trunk):
        assert not trunk.thresholds
        1 / 0  # noqa: B018
    assert trunk.thresholds == {16: 3.0}
    assert feature_distance(trunk, images, known).relative() == feature_distance(trunk, images).relative()


def test_dropped_cells_have_side_zero(images):
    torch.manual_seed(0)
    padded = images.clone()
    padded[:, :, 32:] = 0
    trunk = APTEva02(**TRUNK, thresholds={16: 3.0}, padding="drop").eval()
    assert feature_distance(trunk, padded).side_BHW[:, 4:].eq(0).all()
    trunk = APTEva02(**TRUNK, thresholds={16: 3.0}, merge="random").eval()
    sides_BHW = feature_distance(trunk, images).side_BHW
    assert set(sides_BHW.unique().tolist()) == {0, 8} and int(sides_BHW.eq(8).sum()) == 2 * (8 + 4 * 8)
