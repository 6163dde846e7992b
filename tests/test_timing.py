"""What a time per image stands for: the whole test set, though only some of its images are timed."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from apt_backbones import adapt
from apt_backbones.images import representative
from tools import mm_runs

SIDE, SMOOTH, BUSY = 128, 9, 3  # images of 64 patches of 16 pixels


class Clock:
    """It goes on when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Model(nn.Module):
    """Takes as many seconds per image as it has tokens, and on some occasions ten times as many; with every round of an
    image so many times as in the one before."""

    def __init__(self, trunk, clock, disturbed=(), slower=1):
        super().__init__()
        self.trunk, self.clock, self.disturbed, self.slower, self.calls = trunk, clock, disturbed, slower, 0

    def data_preprocessor(self, batch, training):
        return {"inputs": batch[0][None]}

    def test_step(self, batch):
        factor = 10 if self.calls in self.disturbed else 1
        factor *= self.slower ** (self.calls % (mm_runs.TIMED_ROUNDS + 1))
        self.calls += 1
        self.clock.seconds += factor * self.trunk.layout(batch[0][None]).num_tokens


@pytest.fixture(scope="module")
def images():
    """A quarter of them is busy: those merge nowhere, all others everywhere."""
    noise = torch.rand(BUSY, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 4 - 2
    return [*torch.zeros(SMOOTH, 3, SIDE, SIDE), *noise]


def runner_of(images, thresholds, clock, **options):
    trunk = adapt(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True), thresholds, padding="coarsest")
    loader = SimpleNamespace(dataset=images, collate_fn=list)
    return SimpleNamespace(model=Model(trunk, clock, **options), test_dataloader=loader)


def times(monkeypatch, images, timed, of_merging=None, **options):
    clock = Clock()
    monkeypatch.setattr(mm_runs, "now", clock)
    monkeypatch.setattr(mm_runs, "TIMED_IMAGES", timed)
    merging = runner_of(images, {32: 1.0}, clock, **(of_merging or {}))
    runners = {"dense": runner_of(images, None, clock, **options), "merging": merging}
    return mm_runs.time_interleaved(runners)


def test_the_timed_images_keep_as_many_tokens_as_all(monkeypatch, images):
    """Of four one is busy, as of all; the CLS token is one more."""
    found = times(monkeypatch, images, timed=4)
    assert found == {"dense": 65, "merging": (3 * 17 + 65) / 4}


def test_all_images_are_timed_if_they_are_few(monkeypatch, images):
    assert times(monkeypatch, images, timed=100)["merging"] == (SMOOTH * 17 + BUSY * 65) / (SMOOTH + BUSY)


def test_a_disturbance_does_not_count(monkeypatch, images):
    """Of the rounds the median counts; the first, which warms up, does not."""
    assert times(monkeypatch, images, timed=4, disturbed=(0, 2, 5, 11))["dense"] == 65


def test_a_machine_that_becomes_slower_and_is_disturbed_changes_no_ratio(monkeypatch, images):
    merging = dict(slower=2, disturbed=(2, 6, 10, 14))  # a round of every image
    found = times(monkeypatch, images[:4], timed=4, slower=2, of_merging=merging)
    assert found["merging"] / found["dense"] == pytest.approx(17 / 65)


def test_models_that_share_their_weights_are_set_up_before_they_are_counted_and_timed(monkeypatch, images):
    clock = Clock()
    monkeypatch.setattr(mm_runs, "now", clock)
    monkeypatch.setattr(mm_runs, "TIMED_IMAGES", 4)
    runner = runner_of(images, {32: 1.0}, clock)

    def set_up(title):
        runner.model.trunk.thresholds = {32: 1.0} if title == "merging" else {}

    set_up("dense")
    found = mm_runs.time_interleaved({"dense": runner, "merging": runner}, set_up)
    assert found == {"dense": 65, "merging": (3 * 17 + 65) / 4}


def test_the_choice_suits_every_model():
    """The mean of a tenth of the images is within a few percent of the mean of all, though single images are not."""
    chance = np.random.default_rng(1)
    share = chance.beta(0.5, 1, 100)
    costs = np.stack([np.full(100, 960), 960 * share, 960 * share**2, 1500 * chance.permutation(share)])
    chosen = representative(costs, 10)
    assert len(set(chosen)) == 10
    assert np.abs(costs[:, chosen].mean(1) / costs.mean(1) - 1).max() < 0.05
