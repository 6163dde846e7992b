"""Learned scorers: what distillation learns, and that a file works wherever a scorer's name is taken."""

import os
import random

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from apt_backbones import adapt, score_patches
from apt_backbones.calibrate import calibrate_thresholds, kept_shares, score_maps_of
from apt_backbones.checkpoint import read_file
from apt_backbones.distill import FLOOR, Views, ViewSettings, _jittered, _part, cut_view, make_views, train_scorer
from apt_backbones.learned import ScorerTail, _type_of_sums, in_fixed_point, load_scorer
from apt_backbones.merging_losses import cell_losses, merging_losses

from .scorers import random_scorer, save_scorer

PATCH, SIZES = 4, (8, 16)
MEAN, STD = (120.0, 115.0, 105.0), (58.0, 57.0, 56.0)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return random_scorer(PATCH, 2)


@pytest.fixture(scope="module")
def file(scorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "scorer.safetensors"
    scorer.save(path)
    return str(path)


def scene(chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy object on a plain ground of two colours, and the class of every base cell. Entropy finds the noise,
    which is of one class, and misses the border between the plain colours, which are two."""
    classes = torch.zeros(3, 16, 16)
    image = torch.empty(3, 64, 64)
    at = int(torch.randint(5, 11, (), generator=chance))
    image[:, :, : at * PATCH], image[:, :, at * PATCH :] = (
        torch.tensor(color)[:, None, None] for color in ([60.0, 70, 80], [80.0, 70, 60])
    )
    classes[0, :, :at], classes[1, :, at:] = 1, 1
    top = 2 * int(torch.randint(0, 5, (), generator=chance))
    image[:, top * PATCH : (top + 8) * PATCH, : 4 * PATCH] = torch.rand(3, 32, 16, generator=chance) * 255
    classes[:, top : top + 8, :4] = torch.tensor([0.0, 0, 1])[:, None, None]
    return image.round(), classes


def scenes(count: int, seed: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    images, classes = (torch.stack(part) for part in zip(*(scene(chance) for _ in range(count))))
    return images, dict(zip(SIZES, merging_losses(classes, (2, 4))))


def avoided(scores: torch.Tensor, losses: torch.Tensor) -> float:
    """Share of the mean loss that is avoided if the 90 % of least score are merged."""
    scores, losses = scores.flatten(), losses.flatten()
    chosen = scores.argsort()[: int(0.9 * len(scores))]
    return 1 - float(losses[chosen].mean() / losses.mean())


def test_distilled_it_ranks_patches_better_than_entropy(tmp_path):
    images, losses = scenes(48, 0)
    unseen, true = scenes(16, 1)
    views, held_out = Views(images.byte(), losses), Views(unseen.byte(), true)
    projection = nn.Conv2d(3, 24, PATCH, PATCH)
    arguments = dict(epochs=15, batch=4, width=16, state=tmp_path / "state.pth")
    scorer, curve = train_scorer([views], [held_out], projection, MEAN, STD, **arguments)
    other, again = train_scorer([views], [held_out], projection, MEAN, STD, **arguments)  # all from the state
    assert again == curve and len(curve) == 15 and curve[-1].avoided > 0.9
    ours, entropy = score_patches(unseen, SIZES, scorer), score_patches(unseen, SIZES)
    for size in SIZES:
        assert torch.equal(ours[size], score_patches(unseen, SIZES, other)[size])
        assert (ours[size] >= 0).all()
    assert avoided(ours[8], true[8]) > 0.9 > 0.5 > avoided(entropy[8], true[8])


def test_the_weights_of_the_best_epoch_are_taken_and_scores_are_losses(tmp_path, monkeypatch):
    """What is held out has the losses of other patches, so that the last epoch is not the best."""
    monkeypatch.setattr("apt_backbones.distill.RATE", 2e-2)
    images, losses = scenes(16, 0)
    images += torch.randint(0, 2, images.shape)  # a plain patch would score nothing
    losses = {size: 1e-3 * loss for size, loss in losses.items()}
    others = {size: loss[:5].flip(2) for size, loss in losses.items()}
    views, held_out = Views(images.byte(), losses), Views(images[:5].byte(), others)
    arguments = dict(epochs=6, batch=4, width=8, state=tmp_path / "state.pth")
    scorer, curve = train_scorer([views], [held_out], nn.Conv2d(3, 8, PATCH, PATCH), MEAN, STD, **arguments)
    scores, likelihoods = score_patches(images[:5], SIZES, scorer), []
    for size in SIZES:
        mean = losses[size].mean()
        predicted = scores[size] / mean
        likelihoods.append(((others[size] / mean + FLOOR) / predicted + predicted.log()).mean())
    best = min(epoch.held_out for epoch in curve)
    assert curve[-1].held_out > 1.2 * best
    assert float(sum(likelihoods)) / 2 == pytest.approx(best, rel=0.03)
    assert read_file(tmp_path / "state.pth")["net"]["center"].all(), "E's channels are standardized"


def test_a_mirrored_view_has_the_losses_of_its_patches():
    pixels = torch.arange(36, dtype=torch.uint8).expand(1, 3, 16, 36)  # four columns beyond the whole patches of 16
    losses = {8: torch.arange(8.0).view(1, 2, 4), 16: torch.arange(2.0).view(1, 1, 2)}
    mirrored, found = _part(Views(pixels, losses), torch.tensor([0]), True, torch.device("cpu"))
    assert mirrored[0, 0, 0].tolist() == list(range(31, -1, -1))
    assert found[8].tolist() == [[[3, 2, 1, 0], [7, 6, 5, 4]]] and found[16].tolist() == [[[1, 0]]]


def test_changed_colours_stay_colours():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(8, 3, 4, 4)
    changed = _jittered(pixels, torch.Generator().manual_seed(0))
    assert changed.min() == 0 and changed.max() == 255


def test_no_step_of_a_training_is_larger_for_a_patch_that_loses_far_more_than_predicted():
    """Else a few such patches undo what was learned, as they did with what UperNet says of receipts."""
    images, losses = scenes(8, 0)
    losses = {size: torch.full_like(loss, 1e-3) for size, loss in losses.items()}
    for loss in losses.values():
        loss[3, 0, 0] = 1e3
    norms = []

    def measure(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    handle = register_optimizer_step_pre_hook(measure)
    views = Views(images.byte(), losses)
    try:
        train_scorer([views], [views], nn.Conv2d(3, 8, PATCH, PATCH), MEAN, STD, epochs=2, batch=2, width=8)
    finally:
        handle.remove()
    assert norms and max(norms) < 1.01


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path):
    images, losses = scenes(16, 0)
    views = Views(images.byte(), losses)
    projection = nn.Conv2d(3, 8, PATCH, PATCH)
    arguments = dict(epochs=3, batch=8, width=8)

    def stop(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    whole, curve = train_scorer([views], [views], projection, MEAN, STD, **arguments)
    with pytest.raises(KeyboardInterrupt):
        train_scorer([views], [views], projection, MEAN, STD, **arguments, state=tmp_path / "s.pth", report=stop)
    resumed, same = train_scorer([views], [views], projection, MEAN, STD, **arguments, state=tmp_path / "s.pth")
    assert all(one == pytest.approx(other) for one, other in zip(same, curve, strict=True))
    ours, theirs = (score_patches(images, SIZES, scorer)[8] for scorer in (whole, resumed))
    torch.testing.assert_close(ours, theirs)


def test_fixed_point_says_what_the_trained_convolutions_say():
    torch.manual_seed(0)
    images, _ = scenes(8, 0)
    images += torch.randn_like(images).mul(3).round()
    stem, tail = nn.Conv2d(3, 16, PATCH, PATCH), ScorerTail(16, 2)
    with torch.no_grad():
        stem.weight.mul_(0.05)
        for layer in tail.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(3)
        expected = tail(stem(images.clamp(0, 255)))
    scores = score_patches(images, SIZES, in_fixed_point(stem, tail, images))
    for size, log in zip(SIZES, expected):
        error = scores[size].log() - log
        assert log.std() > 0.1 and error.abs().max() < 0.05 * log.std()


def test_every_sum_is_exact_in_float32(scorer, monkeypatch):
    """So its order, and with it the device, does not matter."""
    images = (torch.rand(2, 3, 64, 64) * 255).round()
    expected = score_patches(images, SIZES, scorer)
    monkeypatch.setattr("apt_backbones.learned._type_of_sums", lambda: torch.float64)
    found = score_patches(images, SIZES, scorer)
    assert all(torch.equal(found[size], expected[size]) for size in SIZES)


@pytest.mark.parametrize("shape", [(64, 96), (37, 53), (3, 70), (16, 15)])
def test_scores_of_any_image_size(scorer, shape):
    images = (torch.rand(2, 3, *shape) * 255).round()
    scores = score_patches(images, SIZES, scorer)
    for size in SIZES:
        rows, columns = shape[0] // size, shape[1] // size
        assert scores[size].shape == (2, -(-shape[0] // size), -(-shape[1] // size))
        assert scores[size].dtype == torch.float32 and (scores[size] > 0).all()
        assert scores[size][:, :rows, :columns].isfinite().all()
        assert scores[size][:, rows:].isinf().all() and scores[size][:, :, columns:].isinf().all()
    alone = score_patches(images[1:], SIZES, scorer)
    assert torch.equal(alone[8], scores[8][1:])


def test_an_image_goes_on_as_its_edge_where_it_fills_no_largest_patch(scorer):
    images = (torch.rand(1, 3, 24, 40) * 255).round()
    whole = score_patches(F.pad(images, (0, 8, 0, 8), mode="replicate"), SIZES, scorer)
    assert torch.equal(score_patches(images, SIZES, scorer)[8], whole[8][:, :3, :5])


def test_pixels_are_rounded(scorer):
    images = torch.randint(0, 255, (1, 3, 32, 32)).float()
    expected = score_patches(images, SIZES, scorer)
    found = score_patches(images + 0.4 * torch.rand_like(images), SIZES, scorer)
    assert all(torch.equal(found[size], expected[size]) for size in SIZES)


def test_the_decision_depends_neither_on_autocast_nor_on_the_precision_of_products(scorer):
    images = (torch.rand(2, 3, 64, 64) * 255).round()
    expected = score_patches(images, SIZES, scorer)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_patches(images, SIZES, scorer)
    assert all(torch.equal(found[size], expected[size]) for size in SIZES)
    half = score_patches(images.half(), SIZES, scorer)  # whole numbers up to 255 are exact
    assert all(torch.equal(half[size], expected[size]) for size in SIZES)
    assert _type_of_sums() == torch.float32
    torch.set_float32_matmul_precision("medium")
    try:
        assert _type_of_sums() == torch.float64, "also where no product is rounded to bfloat16, as on many CPUs"
        found = score_patches(images, SIZES, scorer)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(found[size], expected[size]) for size in SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_gpu_scores_as_a_cpu(scorer, precision):
    images = (torch.rand(2, 3, 224, 224) * 255).round()
    expected = score_patches(images, SIZES, scorer)
    torch.set_float32_matmul_precision(precision)
    try:
        found = score_patches(images.cuda(), SIZES, scorer)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(found[size].cpu(), expected[size]) for size in SIZES)


def test_plain_patches_score_nothing_and_broken_images_nan(scorer):
    images = (torch.rand(3, 3, 32, 32) * 255).round()
    images[0, :, :16, :16] = 124
    images[1, 0, 0, 0] = torch.nan
    images[2, 0, 0, 0] = torch.inf
    scores = score_patches(images, SIZES, scorer)
    assert (scores[8][0, :2, :2] == 0).all() and scores[16][0, 0, 0] == 0 and (scores[8][0] > 0).sum() == 12
    assert scores[8][1].isnan().all() and scores[8][2].isnan().all()


def test_a_file_is_the_scorer(scorer, file):
    images = (torch.rand(2, 3, 40, 48) * 255).round()
    loaded = load_scorer(file)
    assert loaded.origin == {"model": "random"} and loaded.sizes == SIZES
    expected = score_patches(images, SIZES, scorer)
    for given in (file, loaded):
        found = score_patches(images, SIZES, given)
        assert all(torch.equal(found[size], expected[size]) for size in SIZES)
    assert torch.equal(score_patches(images, (8,), file)[8], expected[8]), "the smaller sizes alone"


def test_a_file_that_was_distilled_again_is_read_again(tmp_path):
    images, found = (torch.rand(1, 3, 32, 32) * 255).round(), []
    for second in range(2):
        file = save_scorer(tmp_path / "scorer.safetensors", PATCH, 2)
        os.utime(file, (second, second))
        found.append(score_patches(images, SIZES, file)[8])
    assert not torch.equal(*found)


def test_files_that_are_no_scorer(file, tmp_path):
    weights = load_file(file)
    about = {"format": "apt_backbones.learned_scorer", "version": "2", "patch_size": "4", "sizes": "[8, 16]"}
    about["origin"] = "{}"
    cases = {
        "no learned scorer": (weights, {}),
        "version 9": (weights, {**about, "version": "9"}),
        "damaged: it does": ({**weights, "mix.bias": torch.zeros(3)}, about),
        "mix has values out of range": ({**weights, "mix.step": weights["mix.step"] * torch.nan}, about),
        "stem has values out of range": ({**weights, "stem.weight": weights["stem.weight"] * 0 + 1024}, about),
    }
    for number, (message, (content, metadata)) in enumerate(cases.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path, metadata)
        with pytest.raises(ValueError, match=message) as raised:
            load_scorer(path)
        assert "\n" not in str(raised.value)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(ValueError, match="no readable"):
        load_scorer(tmp_path / "noise.safetensors")
    with pytest.raises(FileNotFoundError, match="distill_scorer"):
        score_patches(torch.rand(1, 3, 8, 8), (8,), str(tmp_path / "none.safetensors"))


def test_other_patch_sizes_are_refused(file):
    with pytest.raises(ValueError, match=r"patches of 8, 16 pixels on base patches of 4; it cannot score"):
        score_patches(torch.rand(1, 3, 64, 64), (32,), file)
    with pytest.raises(ValueError, match="cannot score"):
        adapt(timm.create_model("vit_tiny_patch16_224", num_classes=0), {32: 0.1}, file)


def test_calibrated_it_drives_an_adapted_network(file):
    vit = timm.create_model("vit_tiny_patch16_224", patch_size=4, img_size=64, depth=1, num_classes=0).eval()
    images = (torch.rand(8, 3, 64, 64) * 255).round()
    maps = [score_maps_of(image[None], SIZES, file) for image in images]
    thresholds = calibrate_thresholds(maps, PATCH, 0.6)
    assert float(kept_shares(maps, thresholds, PATCH).mean()) == pytest.approx(0.6, abs=0.02)
    vit = adapt(vit, thresholds, file, merge="resizing")
    normalized = (images / 255 - 0.5) / 0.5
    with torch.no_grad():
        vit.forward_features(normalized)
        assert vit.last_layout.num_patches and sum(vit.last_layout.num_patches) < 0.63 * 8 * 256
    assert vit.state_dict().keys().isdisjoint({"scorer"}), "the scorer is no weight of the network"


def test_views_are_cut_alike_and_kept(tmp_path):
    chance = random.Random(0)
    for number in range(3):
        Image.effect_noise((60 + 10 * number, 50), 80).convert("RGB").save(tmp_path / f"{number}.png")
    settings = ViewSettings((48, 64), copies=2)
    assert cut_view(Image.open(tmp_path / "0.png"), settings, chance).shape == (3, 48, 64)
    calls = []

    def outputs(pixels):
        calls.append(len(pixels))
        return F.avg_pool2d(pixels, 2).softmax(1)  # finer than the base cells

    paths = sorted(tmp_path.glob("*.png"))
    views = make_views(paths, cell_losses(outputs, SIZES), SIZES, settings, tmp_path / "views")
    assert views.pixels.shape == (6, 3, 48, 64) and views.pixels.dtype == torch.uint8
    assert views.losses[8].shape == (6, 6, 8) and views.losses[16].shape == (6, 3, 4)
    count = len(calls)
    again = make_views(paths, cell_losses(outputs, SIZES), SIZES, settings, tmp_path / "views")
    assert len(calls) == count and torch.equal(again.pixels, views.pixels)


def test_llava_s_configuration_and_processor_name_the_file(tmp_path):
    pytest.importorskip("transformers")
    from llava_apt.configuration import AptClipVisionConfig
    from llava_apt.image_processing import LlavaAptImageProcessor

    torch.manual_seed(0)
    file = str(tmp_path / "scorer.safetensors")
    random_scorer(14, 1).save(file)
    settings = dict(thresholds={28: 1.0}, scorer=file)
    AptClipVisionConfig(patch_size=14, **settings).save_pretrained(tmp_path)
    assert AptClipVisionConfig.from_pretrained(tmp_path).scorer == file
    processor = LlavaAptImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **settings)
    processor.save_pretrained(tmp_path)
    processor = LlavaAptImageProcessor.from_pretrained(tmp_path)
    image = Image.effect_noise((56, 56), 80).convert("RGB")
    pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).T.view(1, 3, 56, 56)
    expected = torch.where(score_patches(pixels, (28,), file)[28] < 1.0, 28, 14)
    sides = processor(image, return_tensors="pt")["patch_sides"]
    assert torch.equal(sides[:, ::2, ::2], expected)
    with pytest.raises(FileNotFoundError, match="no scorer"):
        AptClipVisionConfig(scorer=str(tmp_path / "other.safetensors"))
