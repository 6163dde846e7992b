"""Scores and selection: equal to the authors' code on photographs, and clear about bad input."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from apt_backbones import score_patches, select_patches
from apt_backbones.scores import NOT_FINITE, SCORERS
from tests.golden import load_golden

GOLDEN = load_golden("patch_scores").arrays


def photo(name):
    return GOLDEN[f"image/{name}"].permute(2, 0, 1)[None].float()


def named(prefix):
    return sorted(key for key in GOLDEN if key.startswith(prefix))


@pytest.mark.parametrize("key", named("entropy/") + named("laplacian/") + named("upsample_mse/"))
def test_scores_equal_the_authors(key):
    scorer, name, _, size = key.split("/")
    size = int(size.removeprefix("size"))
    images = photo(name)
    scores = score_patches(images, (32, 64, 128), scorer)[size][0]
    rows, columns = images.shape[2] // size, images.shape[3] // size
    torch.testing.assert_close(scores[:rows, :columns], GOLDEN[key][:rows, :columns], atol=1e-5, rtol=0)
    assert scores[rows:].isinf().all() and scores[:, columns:].isinf().all(), "overhanging patches never merge"


@pytest.mark.parametrize("key", named("mask/"))
def test_selections_equal_the_authors_in_every_cell(key):
    _, name, _, thresholds, size = key.split("/")
    size = int(size.removeprefix("size"))
    thresholds = {32 << level: float(value) for level, value in enumerate(thresholds.split("_"))}
    images = photo(name)
    sides = select_patches(score_patches(images, tuple(thresholds)), thresholds, 16, images.shape[2:])[0]
    expected = GOLDEN[key].repeat_interleave(size // 16, 0).repeat_interleave(size // 16, 1)
    assert torch.equal(sides == size, expected[: sides.shape[0], : sides.shape[1]])


@pytest.mark.parametrize("shape", [(37, 53), (64, 64), (130, 70)])
def test_entropy_equals_a_histogram_per_patch(shape):
    images = torch.rand(2, 3, *shape) * 300 - 20  # fractions, and values outside 0..255, which are clamped
    scores = score_patches(images, (8, 16))
    rgb = images.clamp(0, 255).numpy()
    grey = np.float32(0.2989) * rgb[:, 0] + np.float32(0.5870) * rgb[:, 1] + np.float32(0.1140) * rgb[:, 2]
    for size in (8, 16):
        for b, row, column in np.ndindex(2, shape[0] // size, shape[1] // size):
            patch = grey[b, row * size :, column * size :][:size, :size]
            counts, _ = np.histogram(patch, bins=512, range=(0, 256))
            p = counts[counts > 0] / size**2
            assert scores[size][b, row, column] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-5)


def test_entropy_is_exact_where_the_histogram_is():
    stripes = torch.tensor([10.0, 60.0, 110.0, 160.0]).repeat(8)  # four equally frequent values: 2 bits
    images = stripes.expand(1, 3, 32, 32)
    scores = score_patches(images, (32,))
    assert scores[32].item() == 2.0
    assert (select_patches(scores, {32: 2.0}, 16, (32, 32)) == 16).all(), "the comparison with a threshold is strict"
    assert (select_patches(scores, {32: 2.00001}, 16, (32, 32)) == 32).all()


def test_batch_equals_single_images_and_strides_do_not_matter():
    images = torch.rand(3, 3, 70, 90) * 255
    for scorer in SCORERS:
        batch = score_patches(images.contiguous(memory_format=torch.channels_last), (16, 32), scorer)
        for size, scores in batch.items():
            alone = torch.cat([score_patches(image[None], (16, 32), scorer)[size] for image in images])
            torch.testing.assert_close(scores, alone, atol=1e-6, rtol=0)


def test_scoring_leaves_the_images_alone():
    images = torch.rand(1, 3, 64, 64) * 300
    before = images.clone()
    for scorer in SCORERS:
        score_patches(images, (32, 64), scorer)
    assert torch.equal(images, before)


def test_scoring_takes_images_that_need_gradients():
    images = (torch.rand(1, 3, 32, 32) * 255).requires_grad_()
    assert not score_patches(images, (32,))[32].requires_grad


def test_selection_prefers_the_largest_size_and_covers_every_cell():
    images = torch.zeros(1, 3, 100, 140)
    sides = select_patches(score_patches(images, (32, 64)), {32: 1.0, 64: 1.0}, 16, (100, 140))[0]
    expected = torch.full((7, 9), 16)  # 100 / 16 and 140 / 16, rounded up
    expected[:6, :8] = 32
    expected[:4, :8] = 64
    assert torch.equal(sides, expected)


@pytest.mark.parametrize("size", [28, 32])  # the logarithm of 28 * 28 is rounded, that of 32 * 32 is not
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_zero_or_less_merges_nothing(threshold, size):
    scores = score_patches(torch.zeros(1, 3, 2 * size, 2 * size), (size,))
    sides = select_patches(scores, {size: threshold}, size // 2, (2 * size, 2 * size))
    assert (sides == size // 2).all()


@pytest.mark.parametrize("scorer", list(SCORERS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (15, 200), (33, 31)])
def test_images_smaller_than_a_patch_have_only_overhanging_patches(scorer, shape):
    scores = score_patches(torch.rand(1, 3, *shape), (32, 64), scorer)
    for size in (32, 64):
        assert scores[size].shape == (1, -(-shape[0] // size), -(-shape[1] // size))
        inside = scores[size][:, : shape[0] // size, : shape[1] // size]
        assert scores[size].isinf().sum() == scores[size].numel() - inside.numel()
    assert (select_patches(scores, {32: math.inf, 64: math.inf}, 16, shape) == 16).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_is_marked_and_the_others_are_not(value):
    images = torch.rand(2, 3, 64, 64) * 255
    images[1, 2, 5, 7] = value
    for scorer in SCORERS:
        scores = score_patches(images, (32, 64), scorer)
        assert scores[32][0].isfinite().all() and scores[32][1].isnan().all()
        sides = select_patches(scores, {32: math.inf, 64: math.inf}, 16, (64, 64))
        assert (sides[0] == 64).all() and (sides[1] == NOT_FINITE).all()


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"call \.float\(\)"),
        (torch.zeros(1, 1, 8, 8), ValueError, "RGB"),
        (torch.zeros(1, 4, 8, 8), ValueError, "RGBA"),
        (torch.zeros(3, 8, 8), ValueError, r"\(B, 3, H, W\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "empty"),
        (torch.zeros(1, 3, 0, 8), ValueError, "empty"),
    ],
)
def test_bad_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        score_patches(images, (4,))


@pytest.mark.parametrize("sizes", [(), (32, 96), (64, 32), (15,), (0,)])
def test_sizes_that_do_not_double_are_refused(sizes):
    with pytest.raises(ValueError, match="double"):
        score_patches(torch.zeros(1, 3, 64, 64), sizes)


@pytest.mark.parametrize(
    "thresholds, message",
    [
        ({64: 1.0}, r"must be \[32\]"),
        ({32: 1.0, 128: 1.0}, r"must be \[32, 64\]"),
        ({32: math.nan}, "nan"),
        ({32: 1.0, 64: 1.0, 128: 1.0}, r"\[128\], but only \[32, 64\] were scored"),
    ],
)
def test_bad_thresholds_are_refused(thresholds, message):
    scores = score_patches(torch.zeros(1, 3, 64, 64), (32, 64))
    with pytest.raises(ValueError, match=message):
        select_patches(scores, thresholds, 16, (64, 64))


def test_scoring_a_1536_image_needs_at_most_64_mb_of_scratch():
    """In a fresh process, where no memory that was freed earlier hides what is taken."""
    program = """
import re, torch
from apt_backbones import score_patches
from apt_backbones.scores import SCORERS

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
images = torch.rand(1, 3, 1536, 1536).mul_(255)
for scorer in SCORERS:
    score_patches(images[:, :, :256, :256], (32, 64, 128), scorer)  # loads what is loaded once
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = memory("VmRSS")
    score_patches(images, (32, 64, 128), scorer)
    print(scorer, memory("VmHWM") - before)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system at once
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    scratch = dict(line.split() for line in run.stdout.splitlines())
    assert scratch.keys() == SCORERS.keys()
    assert all(15 < float(megabytes) <= 64 for megabytes in scratch.values()), scratch
