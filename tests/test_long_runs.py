"""What long runs on many machines meet: interruption, damaged images, hostile checkpoints, divergence."""

import logging
import os
import pickle
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.datasets import AspectRatioBatchSampler
from mmdet.engine.hooks import PipelineSwitchHook
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import DATASETS, HOOKS, MODELS, RUNNERS
from mmengine.runner import load_checkpoint
from PIL import Image, ImageFile
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import apt_backbones.mm.cls
from apt_backbones import read_checkpoint
from apt_backbones.mm.data import BadData, GuardedDataset, PositionSampler
from apt_backbones.mm.runner import check_normalization, latest_checkpoint, resumable
from tests.scripts import ENVIRONMENT, ROOT, data_options, evaluator_options, run_script

CONFIG = """
_base_ = "{root}/cls_configs/vit_b_16_224_apt.py"
model = dict(
    model="vit_tiny_patch16_224", img_size=32, num_classes=2, drop_path_rate=0.3,
    model_options=dict(depth=2, embed_dim=24, num_heads=2), thresholds={{32: 5.5, 64: 5.5}},
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
)
dataset = dict(model="vit_tiny_patch16_224", img_size=32)
loader = dict(num_workers={workers}, persistent_workers={workers} > 0, batch_size=4)
train_dataloader = dict(
    **loader,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(data_root="{data}", **dataset, transform=dict(no_aug=False, color_jitter=0.4)),
)
val_dataloader = dict(**loader, dataset=dict(data_root="{data}/../validation", **dataset))
test_dataloader = val_dataloader
train_cfg = dict(_delete_=True, by_epoch=False, max_iters={iterations}, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=2, by_epoch=False, max_keep_ckpts=2), logger=dict(interval=1))
log_processor = dict(by_epoch=False)
optim_wrapper = dict(optimizer=dict(lr={rate}))
load_from = None
custom_hooks = {hooks}
"""


def photographs(folder, number=8):
    generator = np.random.default_rng(0)
    for name in ("cold", "warm"):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")
    return folder


@pytest.fixture
def config(tmp_path):
    data = photographs(tmp_path / "data")
    photographs(tmp_path / "validation", number=2)

    def write(workers=0, iterations=12, rate=1e-3, interrupt=0, more=""):
        path = tmp_path / "config.py"
        hooks = [dict(type="Interrupt", after=interrupt)] if interrupt else []
        text = CONFIG.format(root=ROOT, data=data, workers=workers, iterations=iterations, rate=rate, hooks=hooks)
        path.write_text(text + more)
        return str(path)

    return write


@pytest.fixture
def train(monkeypatch, capsys):
    """Run tools/train.py in this process; returns how it ended: None, or the error in one line."""
    monkeypatch.setattr(Config, "pretty_text", property(lambda cfg: str(cfg.to_dict())))

    def run(config, work_dir, *more):
        try:
            run_script(monkeypatch, "tools/train.py", config, "--work-dir", work_dir, *more)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, str) else capsys.readouterr().err.splitlines()[-1]

    return run


def weights(work_dir):
    return read_checkpoint(latest_checkpoint(work_dir))


# ------------------------------------------------------------------------------------------- interruption


def assert_equal_runs(work_dir, other):
    expected = weights(other)
    for name, tensor in weights(work_dir).items():
        assert torch.equal(tensor, expected[name]), name


@HOOKS.register_module()
class Interrupt(Hook):
    """Stands for a crash after an iteration."""

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_one_that_was_not(config, train, tmp_path):
    """Bit for bit on a CPU: weights, with random augmentation, mixup, drop path, and any number of worker processes."""
    assert train(config(), tmp_path / "whole") is None
    seed = f"randomness.seed={resumable(tmp_path / 'whole/iter_12.pth')['seed']}"
    for after, workers in ((3, 0), (5, 2), (8, 1), (11, 0)):
        options = ["--cfg-options", seed if after == 3 else "max_bad_images=9"]  # a resumed run knows its seed
        path = config(workers=workers, interrupt=after)
        assert train(path, tmp_path / "interrupted", "--resume", *options) == "interrupted"
    assert train(config(), tmp_path / "interrupted", "--resume") is None
    assert_equal_runs(tmp_path / "interrupted", tmp_path / "whole")


@pytest.mark.parametrize("saved", ["within epochs", "between epochs"])
def test_a_run_by_epochs_says_what_a_checkpoint_within_one_repeats(config, train, tmp_path, monkeypatch, saved):
    """Four batches an epoch."""
    said = []
    monkeypatch.setattr(MMLogger, "warning", lambda logger, message, *others, **options: said.append(str(message)))
    checkpoint = dict(interval=2, by_epoch=False) if saved == "within epochs" else dict(interval=1, by_epoch=True)
    by_epoch = f"""
train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=3, val_interval=10)
train_dataloader["sampler"] = dict(type="DefaultSampler", shuffle=True)
default_hooks["checkpoint"].update({checkpoint})
"""
    assert train(config(interrupt=7, more=by_epoch), tmp_path / "run") == "interrupted"
    assert not any("resumed" in message for message in said)
    assert train(config(more=by_epoch), tmp_path / "run", "--resume") is None
    repeats = any("resumed at the beginning of the epoch" in message for message in said)
    assert repeats == (saved == "within epochs")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cls", "det", "seg"])
def test_a_run_that_is_killed_ten_times_ends_as_one_that_was_not(task, config, photoshapes, tmp_path):
    """kill -9 at ten moments: as soon as there is another checkpoint, or a while after it."""
    if task == "cls":
        path, options = config(iterations=40), {}
    else:
        checkpoint = ROOT / f"{task}_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
        options = {**data_options(photoshapes), "load_from": checkpoint, "train_dataloader.batch_size": 2}
        options |= evaluator_options(photoshapes) if task == "det" else {}
        options |= {"train_cfg.max_iters": 40, "train_cfg.val_interval": 1000, "default_hooks.checkpoint.interval": 2}
        path = str(ROOT / f"{task}_configs/eva02_tiny_apt_photoshapes.py")
    options |= {"randomness.seed": 7}

    def start(name):
        command = [sys.executable, str(ROOT / "tools/train.py"), path, "--work-dir", str(tmp_path / name), "--resume"]
        command += ["--cfg-options", *(f"{name}={value}" for name, value in options.items())]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    killed, kills = tmp_path / "killed", 0
    while kills < 10:
        seen = latest_checkpoint(killed)
        run = start("killed")
        while run.poll() is None and latest_checkpoint(killed) == seen:
            time.sleep(0.02)
        time.sleep(0.03 * kills)
        if run.poll() is not None:
            break
        run.kill()
        run.wait()
        kills += 1
    assert kills >= 5, run.stderr.read()
    for name in ("killed", "whole"):
        run = start(name)
        assert run.wait() == 0, run.stderr.read()
    assert_equal_runs(killed, tmp_path / "whole")
    assert not list(killed.glob(".*unfinished"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Config, "pretty_text", property(lambda cfg: str(cfg.to_dict())))
    cfg = Config.fromfile(config(iterations=4))
    cfg.work_dir = str(tmp_path / "run")
    runner = RUNNERS.build(cfg)
    save, calls = torch.save, []

    def full_disk(content, file, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runner.train()
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["iter_2.pth"]
    assert resumable(tmp_path / "run/iter_2.pth")["iter"] == 2


def test_an_empty_or_half_written_checkpoint_is_not_taken_for_the_latest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("iter_9.pth", ".iter_12.pth.unfinished", "last_checkpoint"):
        (tmp_path / name).touch()
    for name in ("iter_10.pth", "iter_11-1a2b3c4d.pth", "iter_12_old.pth"):  # as mmengine publishes, and a copy
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "iter_8.pth").write_bytes(b"x")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "iter_10.pth")


def test_weights_alone_are_no_run_to_resume(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights only.*load_from"):
        resumable(tmp_path / "weights.safetensors")


# ------------------------------------------------------------------------------------------- several processes


PLAIN_STEP = """
model.update(drop_path_rate=0.0, mixup=None, thresholds={{32: 5.9, 64: 5.9}})
train_dataloader["batch_size"] = {batch_size}
train_dataloader["dataset"]["transform"] = dict(no_aug=True)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="SGD", lr=0.1))
randomness = dict(seed=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one_with_all_their_images(config, tmp_path, processes):
    """One step on eight images, half of them noise, in which nothing merges."""
    for index in range(8):
        Image.new("RGB", (48, 40), (20 * index, 0, 99)).save(tmp_path / f"data/cold/{index}.jpg")
    results = {}
    for number in (1, processes):
        path, work_dir = config(iterations=1, more=PLAIN_STEP.format(batch_size=8 // number)), tmp_path / f"run{number}"
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
        program += [str(ROOT / "tools/train.py"), path, "--launcher", "pytorch", "--work-dir", str(work_dir)]
        done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results[number] = weights(work_dir)
    assert results[1]["trunk.adaptive_embed.zero_mlp.weight"].any()
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[processes][name], tensor, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- damaged images


@pytest.fixture(autouse=True)
def _truncated_images_are_errors(monkeypatch):
    """PIL's default, which some packages change for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def damage(folder):
    """One file of each kind that does not load; returns them."""
    sound = (folder / "cold/0.jpg").read_bytes()
    files = {
        "truncated.jpg": sound[: len(sound) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "bomb.png": bomb(),
    }
    for name, content in files.items():
        (folder / "cold" / name).write_bytes(content)
    return {str(folder / "cold" / name) for name in files}


def bomb():
    """A few bytes that claim to be 20,000 x 20,000 pixels."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def odd_images(folder):
    """Unusual files that load: they are no damage."""
    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    pixels.convert("CMYK").save(folder / "warm/cmyk.jpg")
    pixels.convert("P").save(folder / "warm/palette.png")
    pixels.convert("RGBA").save(folder / "warm/alpha.png")
    Image.fromarray(np.full((40, 48), 30000, np.uint16)).save(folder / "warm/deep.png")
    pixels.save(folder / "warm/animated.gif", save_all=True, append_images=[pixels.rotate(90)])
    pixels.resize((1, 1)).save(folder / "warm/pixel.png")
    pixels.resize((1, 4000)).save(folder / "warm/narrow.png")
    pixels.save(folder / "warm/not_png_but.png", format="JPEG")


def folder_of_classes(root):
    return dict(type="FolderOfClasses", data_root=str(root), model="vit_tiny_patch16_224", img_size=32)


def test_training_skips_damaged_images_and_lists_them(tmp_path):
    data = photographs(tmp_path / "data")
    odd_images(data)
    bad = damage(data)
    report = tmp_path / "bad_images.txt"
    dataset = GuardedDataset(folder_of_classes(data), limit=4, report=str(report))
    for _ in range(2):
        items = [dataset[index] for index in range(len(dataset))]
    assert all(item["inputs"].shape == (3, 32, 32) for item in items)
    lines = report.read_text().splitlines()
    assert {line.split(":")[0] for line in lines} == bad and len(lines) == 4, "once each"


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_end_the_training_with_their_list(tmp_path, workers):
    data = photographs(tmp_path / "data")
    damage(data)
    dataset = GuardedDataset(folder_of_classes(data), limit=2, report=str(tmp_path / "bad_images.txt"))
    with pytest.raises(BadData) as error:
        list(DataLoader(dataset, batch_size=4, num_workers=workers))
    message = str(error.value)
    assert message.startswith("3 images cannot be read, more than max_bad_images=2 allows: ")
    assert "\n" not in message and "Traceback" not in message and "bad_images.txt" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_ends_at_the_first_damaged_image_by_name(tmp_path, workers):
    data = photographs(tmp_path / "data")
    damage(data)
    with pytest.raises(BadData, match=r"^\S*cold/(bomb|empty|text|truncated)\.\w+: ") as error:
        list(DataLoader(GuardedDataset(folder_of_classes(data)), batch_size=4, num_workers=workers))
    assert len(str(error.value)) < 300


def test_the_training_tool_goes_on_and_the_test_tool_says_which_image(config, train, tmp_path, monkeypatch):
    path = config(iterations=2)
    bad = damage(tmp_path / "data")
    assert train(path, tmp_path / "run") is None
    assert len((tmp_path / "run/bad_images.txt").read_text().splitlines()) <= len(bad)
    damage(tmp_path / "validation")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "tools/test.py", path, tmp_path / "run/iter_2.pth")
    message = ended.value.code
    assert message.startswith("error: ") and "validation/cold/bomb.png" in message and len(message) < 300


# ------------------------------------------------------------------------------------------- random states


class Draws(Dataset):
    """Items that are what augmentation draws."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.random(), torch.rand(())], dtype=torch.float64)


def test_augmentation_depends_on_the_place_in_the_run_alone():
    def run(workers, skipped=0):
        dataset = GuardedDataset(Draws(), seed=3)
        sampler = PositionSampler(dict(type="InfiniteSampler"), dataset, seed=5)
        if skipped:
            sampler.skip(skipped)
        loader = iter(DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers))
        return torch.cat([next(loader) for _ in range(10 - skipped // 2)])

    whole = run(0)
    assert torch.equal(run(2), whole)
    assert torch.equal(run(2, skipped=6), whole[6:])
    again = whole[10:]
    assert not torch.equal(again[again[:, 0].argsort()][:, 1:], whole[:10][whole[:10, 0].argsort()][:, 1:])


def test_every_epoch_and_every_process_augments_otherwise(monkeypatch):
    dataset = GuardedDataset(Draws(), seed=3)
    sampler = PositionSampler(dict(type="DefaultSampler", shuffle=False), dataset, seed=5)
    sampler.set_epoch(2)
    assert list(sampler) == [(index, 20 + index) for index in range(10)]
    first = dataset[0, 20]
    monkeypatch.setattr("apt_backbones.mm.data.get_rank", lambda: 1)
    assert (dataset[0, 20] != first)[1:].all()


class Photos(Dataset):
    """A data set of mmdet's kind: a pipeline, and what is known of an image before it is loaded."""

    def __init__(self):
        self.pipeline = str

    def __len__(self):
        return 6

    def get_data_info(self, index):
        return {"width": 40 if index % 2 else 20, "height": 30}

    def __getitem__(self, index):
        return self.pipeline(index)


def test_a_hook_may_exchange_the_pipeline_of_a_guarded_data_set():
    guarded = GuardedDataset(Photos(), seed=3)
    PipelineSwitchHook.before_train_epoch(
        SimpleNamespace(switch_epoch=1, switch_pipeline=[dict(type="Resize", scale=(8, 8))], _has_switched=False),
        SimpleNamespace(epoch=1, logger=logging.getLogger(), train_dataloader=DataLoader(guarded)),
    )
    assert guarded.dataset.pipeline is guarded.pipeline and "Resize" in repr(guarded.pipeline)


def test_images_are_batched_by_their_shape():
    guarded = GuardedDataset(Photos(), seed=3)
    sampler = PositionSampler(dict(type="DefaultSampler"), guarded, seed=5)
    batches = list(DataLoader(guarded, batch_sampler=AspectRatioBatchSampler(sampler, 3)))
    assert sorted(sorted(batch) for batch in batches) == [["0", "2", "4"], ["1", "3", "5"]]


def test_a_diverged_run_ends_with_an_error_and_no_checkpoint(config, train, tmp_path):
    message = train(config(iterations=4, rate=1e30), tmp_path / "run")
    assert message.startswith("error: the loss is nan near iteration")
    assert not list((tmp_path / "run").glob("*.pth"))


# ------------------------------------------------------------------------------------------- hostile checkpoints


class Layer(BaseModule):
    """A part of a model, with mmengine's way of loading weights."""

    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.linear = nn.Linear(1, 1)


class Command:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint that makes a folder when it is unpickled, and that folder."""
    marker, path = tmp_path / "executed", tmp_path / "hostile.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "meta": Command(marker)}, path)
    with pytest.raises((pickle.UnpicklingError, FileExistsError)):
        marker.mkdir()
        torch.load(path, weights_only=False)  # it does so
    marker.rmdir()
    return path, marker


def test_no_module_executes_the_checkpoint_that_a_config_gives_it(hostile):
    path, marker = hostile
    for kind in ("Pretrained", "mmengine.Pretrained"):
        model = Layer(dict(type=kind, checkpoint=str(path)))
        with pytest.raises(ValueError, match=r"would execute (posix|os|nt)\.mkdir") as error:
            model.init_weights()
        assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match="would execute"):
        load_checkpoint(nn.Linear(1, 1), str(path))
    assert not marker.exists()


def test_nothing_is_downloaded():
    with pytest.raises(ValueError, match="nothing is downloaded"):
        load_checkpoint(nn.Linear(1, 1), "https://example.org/weights.pth")


def test_averages_of_weights_start_from_safetensors(config, tmp_path):
    cfg = Config.fromfile(config(iterations=2))
    cfg.custom_hooks.append(dict(type="EMAHook"))
    cfg.work_dir = str(tmp_path / "run")
    save_file(MODELS.build(cfg.model).state_dict(), tmp_path / "weights.safetensors")
    cfg.load_from = str(tmp_path / "weights.safetensors")
    RUNNERS.build(cfg).train()
    assert "ema_state_dict" in torch.load(tmp_path / "run/iter_2.pth", weights_only=False)


def test_mutated_checkpoints_are_read_or_refused(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(64)}, "meta": {"iter": 1}}, tmp_path / "whole.pth")
    whole, generator = (tmp_path / "whole.pth").read_bytes(), random.Random(0)
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 8)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        (tmp_path / "mutated.pth").write_bytes(content[: generator.randint(1, len(content))])
        try:
            read_checkpoint(tmp_path / "mutated.pth")
        except ValueError as error:
            assert str(error)


# ------------------------------------------------------------------------------------------- mistakes


def test_data_that_are_normalized_otherwise_than_the_trunk_undoes_are_refused():
    class Host(nn.Module):
        def __init__(self, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)):
            super().__init__()
            self.data_preprocessor = MODELS.build(dict(type="ImgDataPreprocessor", mean=mean, std=std))
            self.backbone = MODELS.build(
                dict(type="APTEva02", img_size=32, embed_dim=24, depth=1, num_heads=2, thresholds={32: 5.0})
            )

    check_normalization(Host())
    other = Host(mean=[127.5] * 3)
    for model in (other, nn.ModuleDict({"module": other})):  # alone, and as test-time augmentation wraps it
        with pytest.raises(ValueError, match=r"normalizes by \[127\.5.*pixel_mean"):
            check_normalization(model)
    with pytest.raises(ValueError, match=r"normalizes by \[127\.5.*undoes \[58\.395"):
        check_normalization(Host(std=[127.5] * 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cfg-options", "padding"], "--cfg-options takes key=value, not padding"),
        (["--cfg-options", "model.thresholds.32=abc"], "thresholds must map sizes in pixels to numbers"),
        (["--cfg-options", "model.tresholds=3"], "unexpected keyword argument 'tresholds'"),
        (["--cfg-options", "model.thresholds=3"], "thresholds must map sizes in pixels to numbers"),
        (["--amp"], "--amp needs a GPU"),
        (["--resume", "weights.safetensors"], "holds weights only"),
    ],
)
def test_mistakes_end_in_one_line(config, train, tmp_path, arguments, message):
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    arguments = [tmp_path / name if name.endswith(".safetensors") else name for name in arguments]
    if "--amp" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = train(config(), tmp_path / "run", *arguments)
    assert message in ended and "\n" not in ended


def test_data_set_classes_are_found_by_name():
    assert DATASETS.get("GuardedDataset") is GuardedDataset and apt_backbones.mm.cls.FolderOfClasses
