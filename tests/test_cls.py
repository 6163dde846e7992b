"""Classification: configs, data, training, testing and metrics, on a folder of small pictures by class."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from apt_backbones import adapt
from apt_backbones.distance import merging_off
from apt_backbones.images import to_tensor
from apt_backbones.learned import load_scorer
from apt_backbones.mm.cls import ClassesHook, ThroughputHook
from apt_backbones.new_layers import load_new_layers
from tests.golden import relative_error
from tests.scripts import run_script
from tools import test, train
from tools.frozen_model import frozen_model
from tools.mm_model import MMModel
from tools.patch_settings import settings_of

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "cls_configs").glob("*.py"))
NETWORK = dict(model="vit_tiny_patch16_224", img_size=64, model_options=dict(depth=2))


@pytest.fixture
def data(tmp_path):
    """Two classes that a linear layer tells apart, smooth above and busy below."""
    random = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 6)):
        for name, colour in (("cold", (0, 0, 200)), ("warm", (200, 0, 0))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = np.full((80, 90, 3), colour, np.uint8)
                pixels[40:] = random.integers(0, 255, (40, 90, 3)) // 2 + pixels[40:] // 4
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_name_models_that_timm_has_and_that_take_their_images(path):
    cfg = Config.fromfile(path)
    assert timm.is_model(cfg.model.model.split(".")[0])
    assert timm.get_pretrained_cfg(cfg.model.model, allow_unregistered=False) is not None
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.model == cfg.model.model and loader.dataset.img_size == cfg.model.img_size
    with torch.device("meta"):
        model = MODELS.build({**cfg.model, "model_options": {**cfg.model.get("model_options", {}), "depth": 1}})
    patch = model.trunk.patch_size
    assert cfg.model.img_size % patch == 0
    assert list(model.trunk.thresholds) == ([] if path.stem.endswith("dense") else [2 * patch, 4 * patch])
    assert cfg.load_from == f"checkpoints/{cfg.model.model}.safetensors"


def options(data, **more):
    """Flags that make a config of ours small."""
    folders = {"train_dataloader": "train", "val_dataloader": "val", "test_dataloader": "val"}
    flags = {f"{loader}.dataset.data_root": data / split for loader, split in folders.items()}
    small = {"num_workers": 0, "persistent_workers": False, "batch_size": 4}
    flags |= {f"{loader}.{name}": value for loader in folders for name, value in small.items()}
    flags |= {"model.model_options.depth": 2, "model.num_classes": 2, "model.new_classifier": True}
    flags |= {"randomness.seed": 0}
    return [f"{name}={value}" for name, value in (flags | more).items()]


@pytest.fixture
def weights(tmp_path):
    """timm's checkpoint of the network, but with two blocks."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=2)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    return str(tmp_path / "timm.safetensors")


def test_trains_from_timms_weights_and_tests_what_it_saved(data, weights, tmp_path):
    config = str(ROOT / "cls_configs/vit_b_16_224_apt.py")
    more = {"load_from": weights, "optim_wrapper.optimizer.lr": 3e-4, "train_cfg.max_epochs": 3}
    train.main([config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options(data, **more)])
    checkpoint = str(tmp_path / "run/epoch_3.pth")
    metrics = test.main([config, checkpoint, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options(data)])
    assert metrics["top1"] == 100 and metrics["top5"] == 100
    assert metrics["content_kept"] < 0.9
    assert metrics["images_per_second"] > 0
    more = [*options(data), f"test_dataloader.dataset.data_root={data / 'val_of_one'}"]
    (data / "val_of_one").mkdir()
    (data / "val/warm").rename(data / "val_of_one/warm")
    with pytest.raises(ValueError, match=r"val_of_one has other classes .* differ in cold"):
        test.main([config, checkpoint, "--work-dir", str(tmp_path / "other"), "--cfg-options", *more])
    (data / "val_of_one/cold").mkdir()
    assert test.main([config, checkpoint, "--work-dir", str(tmp_path / "other"), "--cfg-options", *more])["top1"] == 100
    trained = torch.load(checkpoint, weights_only=False)["state_dict"]
    start = timm.create_model("vit_base_patch16_224", depth=2, num_classes=2).state_dict()
    assert trained["trunk.adaptive_embed.zero_mlp.weight"].any(), "the new layers train"
    assert not torch.equal(trained["trunk.blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])


@torch.no_grad()
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_dense_is_timm_and_a_merged_patch_counts_by_its_area(global_pool):
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, global_pool=global_pool)
    for parameter in host.parameters():
        nn.init.normal_(parameter, 0.02, 0.05)
    host.eval()
    network = {**NETWORK, "model_options": dict(depth=2, global_pool=global_pool)}
    dense = MODELS.build(dict(type="TimmClassifier", num_classes=3, **network)).eval()
    dense.adapt_state_dict(weights := dict(host.state_dict()))
    dense.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64)
    images[:, :, :32] = 0.5
    labels = torch.zeros(2, dtype=torch.long)
    assert torch.equal(dense(images, labels), host(images)), "timm's own code runs"

    adaptive = adapt(dense.trunk, {32: 4.0})
    tokens = adaptive.forward_features(images)
    if global_pool == "avg":
        *_, (_, x_TD, layout) = adaptive.run(images)
        area_T1 = (layout.side_T[:, None] / 16).square()
        means = [x.sum(0) / 16 for x in (area_T1 * x_TD).split(layout.images.lengths)]
        assert max(layout.num_patches) < 16
        assert relative_error(adaptive(images), adaptive.head(adaptive.fc_norm(torch.stack(means)))) <= 1e-5
    else:
        assert relative_error(adaptive(images), adaptive.head(tokens[:, 0])) <= 1e-5


@pytest.fixture
def small_config(tmp_path):
    """A configuration of a small adaptive network with adapters, and its weights as timm has them."""
    network = dict(NETWORK, num_classes=2, merge="resizing", adapter_rank=2)
    dataset = dict(model=NETWORK["model"], img_size=NETWORK["img_size"])
    lines = [f"_base_ = {str(ROOT / 'cls_configs/vit_b_16_224_apt.py')!r}", f"model = {network}"]
    (tmp_path / "small.py").write_text("\n".join([*lines, f"test_dataloader = dict(dataset={dataset})"]))
    torch.manual_seed(0)
    model = timm.create_model(NETWORK["model"], img_size=64, depth=2, num_classes=2)
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    return str(tmp_path / "small.py"), str(tmp_path / "small.safetensors"), model.eval()


def test_tools_see_what_a_classifier_sees(data, small_config):
    config, weights, host = small_config
    settings, cfg = settings_of(config), Config.fromfile(config)
    assert (settings.patch_size, settings.thresholds, settings.scorer) == (16, {32: 5.5, 64: 5.5}, "entropy")
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, data_root=str(data / "val")))
    path, frozen = dataset.samples[0][0], frozen_model(config, weights, None)
    images = frozen.normalized(to_tensor(settings.prepare(Image.open(path).convert("RGB"))))
    torch.testing.assert_close(images[0], dataset[0]["inputs"], rtol=0, atol=1e-5)
    with torch.no_grad(), merging_off(frozen.trunk):
        torch.testing.assert_close(frozen.head(images), host(images).softmax(1))
        torch.testing.assert_close(host.head(frozen.pooled(images)), host(images))
        assert frozen.features(images).shape == (1, 192, 4, 4)
    with pytest.raises(ValueError, match=r"small\.py is a classifier's; this is for detectors and segmenters"):
        MMModel(config, weights)
    with pytest.raises(ValueError, match="has no thresholds: its model is dense"):
        frozen_model(str(ROOT / "cls_configs/vit_b_16_224_dense.py"), weights, None)


def test_what_classifiers_learn_without_labels(data, small_config, tmp_path, monkeypatch, capsys):
    """A scorer from what the classifier says, thresholds, and adapters."""
    config, weights, _ = small_config
    images, scorer = ["--images", data / "val"], tmp_path / "scorer.safetensors"
    model = [config, "--weights", weights, *images, "--device", "cpu"]
    run_script(monkeypatch, "tools/distill_scorer.py", *model, "--epochs", 1, "--copies", 1, "--out", scorer)
    found = load_scorer(scorer)
    assert (found.sizes, found.origin["target"], found.origin["view"]) == ((32, 64), "head", [128, 128])
    run_script(monkeypatch, "tools/calibrate.py", *images, "--config", config, "--scorer", scorer, "--keep", 0.7)
    assert "thresholds={32: " in capsys.readouterr().out
    layers = ["--out", tmp_path / "adapters.safetensors", "--iterations", 3, "--batch", 2, "--rate", 0.1]
    run_script(monkeypatch, "tools/finetune_features.py", *model, "--scorer", scorer, "--keep", 0.7, *layers)
    classifier = MODELS.build(Config.fromfile(config).model)
    load_new_layers(classifier, tmp_path / "adapters.safetensors")
    assert classifier.trunk.token_adapters[0].mlp.up.weight.any()


def test_classifiers_learn_smaller_images_from_views_without_borders(data, small_config, tmp_path, monkeypatch):
    """As they see none in use."""
    config, weights, _ = small_config
    seen = []
    monkeypatch.setattr(
        "apt_backbones.mm.smaller_images.finetune_for_smaller_images",
        lambda model, outputs, sizes, paths, views, *others, **options: seen.append(views) or {"distance": [1.0]},
    )
    files = ["--images", data / "val", "--out", tmp_path / "smaller.safetensors"]
    run_script(monkeypatch, "tools/finetune_smaller.py", config, "--weights", weights, *files, "--device", "cpu")
    assert min(seen[0].scales) >= 1


def test_mixup_gives_soft_targets_in_training_only():
    torch.manual_seed(0)
    mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)
    model = MODELS.build(dict(type="TimmClassifier", num_classes=2, mixup=mixup, **NETWORK))
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    for count in (4, 3, 1):  # the last batch of an epoch may be odd
        assert model(images[:count], labels[:count], mode="loss")["loss"].isfinite()
    plain = MODELS.build(dict(type="TimmClassifier", num_classes=2, **NETWORK))
    expected = nn.functional.cross_entropy(plain(images, labels), labels)
    assert torch.equal(plain(images, labels, mode="loss")["loss"], expected)


def test_accuracy_counts_the_best_and_the_five_best():
    metric = METRICS.build(dict(type="TopAccuracy"))
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.linspace(0.5, 0, 8)
    metric.process({}, [{"logits": row, "label": label} for row, label in zip(logits, [0, 0, 7, 3])])
    assert metric.compute_metrics(metric.results) == {"top1": 50.0, "top5": 75.0}


def test_throughput_leaves_the_first_batch_out(monkeypatch):
    seconds = iter([0, 100, 200, 201, 300, 303])
    monkeypatch.setattr("apt_backbones.mm.cls.now", lambda: next(seconds))
    hook, runner, metrics = ThroughputHook(), SimpleNamespace(model=nn.Identity()), {}
    hook.before_test_epoch(runner)
    for count in (8, 8, 4):
        runner.model(0)
        hook.after_test_iter(runner, 0, outputs=[None] * count)
    hook.after_test_epoch(runner, metrics)
    assert metrics == {"images_per_second": 12 / 4}


def test_data_is_normalized_as_the_model_was_trained(data):
    """augreg's ViT-B was trained on pixels from -1 to 1, MAE's on ImageNet's mean and deviation."""
    for model, mean in (("vit_base_patch16_224", 0.5), ("vit_base_patch16_224.mae", 0.485)):
        dataset = DATASETS.build(dict(type="FolderOfClasses", data_root=str(data / "val"), model=model, img_size=56))
        image = dataset[0]["inputs"]
        assert image.shape == (3, 56, 56) and dataset[0]["labels"] == 0
        std = timm.get_pretrained_cfg(model).std[0]
        assert image[0, 0, 0] == pytest.approx(-mean / std, abs=1e-4), "the first class has no red"


def test_more_folders_than_classes_are_refused(data, weights, tmp_path):
    (data / "train/extra").mkdir()
    Image.new("RGB", (80, 90)).save(data / "train/extra/0.png")
    config = str(ROOT / "cls_configs/vit_b_16_224_apt.py")
    with pytest.raises(ValueError, match=r"has 3 folders of classes; set model.num_classes=3"):
        train.main([config, "--work-dir", str(tmp_path), "--cfg-options", *options(data, load_from=weights)])


def test_as_many_classes_of_other_names_are_refused():
    def loader(*classes):
        return SimpleNamespace(dataset=SimpleNamespace(metainfo={"classes": classes}, root="val"))

    vit = adapt(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2), {32: 5.0})
    runner, hook = SimpleNamespace(model=vit, train_dataloader=loader("cat", "dog")), ClassesHook()
    hook.before_train(runner)
    runner.val_dataloader = loader("cat", "dog")
    hook.before_val(runner)
    runner.val_dataloader = loader("cat", "owl")
    with pytest.raises(ValueError, match=r"val has other classes .* differ in dog, owl"):
        hook.before_val(runner)


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "empty/class").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no images in the folders of .*empty"):
        DATASETS.build(dict(type="FolderOfClasses", data_root=str(tmp_path / "empty"), model="vit_base_patch16_224"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DATASETS.build(dict(type="FolderOfClasses", data_root=str(tmp_path / "nowhere"), model="vit_base_patch16_224"))
