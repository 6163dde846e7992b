"""The benchmark measures models that compute what they claim, and its figures mean what they say."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apt_backbones import APTEva02, PatchLayout, score_patches
from apt_backbones.freeze import is_new
from benchmarks import clock, report, scorers
from benchmarks import run_all as all_parts
from benchmarks.cases import Case, Eva02Trunks, block_gflops, core
from benchmarks.images import load_images, make_batch
from benchmarks.llava import SHAPES as LLAVA_SHAPES
from benchmarks.reference_eva02 import ReferenceEva02
from benchmarks.timm_trunks import ReferenceTimm, TimmTrunks
from tests.golden import relative_error
from tests.scripts import ROOT, run_script
from tools import benchmark

TOOL = "tools/benchmark.py"
CLASSIFIER = ROOT / "cls_configs/vit_b_16_224_apt.py"

CONFIG = """
model = dict(backbone=dict(type="APTEva02", img_size=128, embed_dim=48, depth=2, num_heads=3, window_size=4,
                           global_blocks=(1,), thresholds={32: 4.0, 64: 4.0}))
"""


@pytest.mark.parametrize("size", [(128, 128), (64, 128)])
@pytest.mark.parametrize("options", [dict(window_size=4, global_blocks=(1,)), dict(use_cls_token=True)])
def test_the_dense_baseline_equals_the_packed_model(size, options):
    model = APTEva02(img_size=128, embed_dim=48, depth=3, num_heads=3, out_indices=(0, 2), **options).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        for ours, theirs in zip(model(images), ReferenceEva02(model)(images)):
            assert relative_error(ours, theirs) <= 1e-5


def test_the_dense_baseline_pads_windows_as_vitdet_does():
    """A grid of 5 x 6 cells in windows of 4: padded to 8 x 8, then cut back."""
    model = APTEva02(img_size=128, embed_dim=48, depth=2, num_heads=3, window_size=4).eval()
    with torch.no_grad():
        assert ReferenceEva02(model)(torch.randn(1, 3, 80, 96))[0].shape == (1, 48, 5, 6)


def test_the_dense_baseline_is_dense():
    with pytest.raises(ValueError, match="without thresholds"):
        ReferenceEva02(APTEva02(img_size=128, embed_dim=48, depth=2, num_heads=3, thresholds={32: 1.0}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    half = torch.full((96, 160, 3), 120, dtype=torch.uint8)
    half[:, 80:] = torch.randint(0, 256, (96, 80, 3), dtype=torch.uint8)
    Image.fromarray(half.numpy()).save(tmp_path / "half.png")
    return tmp_path


def run(monkeypatch, folder, *arguments, model=None):
    """Run the tool on one image and return its report."""
    options = ["--images", folder / "half.png", "--device", "cpu", "--rounds", 1, "--json", folder / "b.json"]
    run_script(monkeypatch, TOOL, model or folder / "config.py", *options, *arguments)
    return json.loads((folder / "b.json").read_text())


def rows_of(result):
    return {row["mode"]: row for row in result["rows"]}


def test_a_run_reports_every_mode_with_what_it_kept(folder, monkeypatch, capsys):
    written = run(monkeypatch, folder, "--keep", 0.7, "--stages")
    rows = rows_of(written["results"][0])
    assert list(rows) == ["dense", "dense-rect", "packed", "random 0.7", "resizing 0.7", "apt 0.7", "apt-rect 0.7"]
    assert rows["dense"]["content_kept"] == rows["dense"]["padding_kept"] == 1
    assert rows["dense"]["tokens_per_image"] == 64 and rows["dense-rect"]["tokens_per_image"] == 40
    assert rows["apt 0.7"]["content_kept"] == rows["resizing 0.7"]["content_kept"] <= 0.75
    assert rows["apt 0.7"]["gflops_per_image"] < rows["dense-rect"]["gflops_per_image"]
    for row in rows.values():
        assert len(row["seconds"]) == 1 and row["speed_vs_dense"]["min"] <= row["speed_vs_dense"]["max"]
        assert row["peak_gb"] > 0 and {"embed", "trunk", "map"} <= row["stages_ms"].keys()
    assert {"score", "layout", "rotary"} <= rows["apt 0.7"]["stages_ms"].keys()
    assert {"hardware", "torch", "command", "date"} <= written.keys()
    assert "apt 0.7" in capsys.readouterr().out


TIMM = """
model = dict(backbone=dict(type="APTTimm", model="vit_tiny_patch16_224", out_indices=(5, -1),
                           thresholds={{32: 4.0}}, {}))
"""


def timm_config(folder, options=""):
    (folder / "timm.py").write_text(TIMM.format(options))
    return folder / "timm.py"


def test_the_dense_mode_of_a_timm_vit_is_timms_own_code(folder, monkeypatch):
    """And without merging both others compute the same; classifiers see squares."""
    written = run(monkeypatch, folder, "--keep", 0.7, "--stages", model=timm_config(folder, "norm=True"))
    rows = rows_of(written["results"][0])
    assert list(rows) == ["dense", "dense-rect", "packed", "random 0.7", "resizing 0.7", "apt 0.7", "apt-rect 0.7"]
    assert rows["dense"]["tokens_per_image"] == rows["packed"]["tokens_per_image"] == 14**2
    assert rows["apt 0.7"]["content_kept"] == rows["resizing 0.7"]["content_kept"] <= 0.75
    assert rows["apt 0.7"]["gflops_per_image"] < rows["dense"]["gflops_per_image"] == rows["packed"]["gflops_per_image"]
    (classifier,) = run(monkeypatch, folder, "--modes", "packed,apt", model=CLASSIFIER)["results"]
    assert rows_of(classifier)["packed"]["tokens_per_image"] == 14**2

    right = ReferenceTimm.forward
    monkeypatch.setattr(ReferenceTimm, "forward", lambda *args: tuple(1.01 * x for x in right(*args)))
    with pytest.raises(AssertionError, match="packed and dense differ"):
        run(monkeypatch, folder, "--modes", "dense,packed", model=timm_config(folder))


@pytest.mark.parametrize("options", ["window_size=2", "map_fill='interpolate', map_scale=2", "keep_prefix=False"])
def test_where_timm_has_no_such_network_the_packed_one_is_compared_with(folder, monkeypatch, options):
    rows = rows_of(run(monkeypatch, folder, model=timm_config(folder, options))["results"][0])
    assert "dense" not in rows and rows["packed"]["speed_vs_packed"]["median"] == 1
    assert rows["resizing 0.7"]["speed_vs_packed"]["median"] > 0


def test_a_full_fine_tune_of_the_dense_model_is_compared_with_the_short_one(folder, monkeypatch, capsys):
    written = run(monkeypatch, folder, "--train-step", "--plot", folder / "speed.png")
    rows = rows_of(written["results"][0])
    assert list(rows) == ["dense", "dense-rect", "packed", "apt 0.7", "apt-rect 0.7"]
    model = APTEva02(img_size=128, embed_dim=48, depth=2, num_heads=3, thresholds={32: 4.0, 64: 4.0})
    new = sum(parameter.numel() for name, parameter in model.named_parameters() if is_new(name))
    host = sum(parameter.numel() for name, parameter in model.named_parameters() if not is_new(name))
    assert rows["apt 0.7"]["trained_parameters"] == new and rows["dense"]["trained_parameters"] == host
    assert rows["apt 0.7"]["activations_gb"] < rows["dense-rect"]["activations_gb"] < rows["dense"]["activations_gb"]
    assert "training step" in capsys.readouterr().out
    assert Image.open(folder / "speed.png").width > 300


@pytest.mark.parametrize("modes", ["apt,dense", "apt,dense-rect"])
def test_plots_are_relative_to_the_reference_wherever_it_stands(folder, monkeypatch, modes):
    for sizes in ([128], [64, 128]):
        arguments = ["--img-sizes", *sizes, "--modes", modes, "--plot", folder / f"{len(sizes)}.png"]
        run(monkeypatch, folder, "--keep", 0.6, "--blocks", 1, *arguments)
    assert {path.name for path in folder.glob("*.png")} >= {"1.png", "2_sides.png", "2_tokens.png"}


def test_a_plot_without_a_reference_is_refused_before_anything_is_measured(folder, monkeypatch):
    with pytest.raises((SystemExit, ValueError), match="add dense to --modes"):
        run(monkeypatch, folder, "--modes", "packed,apt", "--plot", folder / "speed.png")
    assert not (folder / "speed.png").exists()


def test_cost_growth_is_plotted_over_sizes_and_over_tokens(folder, monkeypatch):
    sizes = ["--img-sizes", 64, 128, "--keep", 1, 0.6, "--modes", "dense,apt", "--blocks", 1]
    written = run(monkeypatch, folder, *sizes, "--plot", folder / "growth.png")
    assert [result["img_size"] for result in written["results"]] == [64, 128]
    assert "blocks 1-1 of 2" in written["results"][0]["title"]
    for name in ("growth_sides.png", "growth_tokens.png"):
        assert Image.open(folder / name).width > 300


def test_whole_detectors_have_the_same_boxes_to_compute_in_every_mode(folder, monkeypatch):
    config = ROOT / "det_configs/eva02_tiny_apt_photoshapes.py"
    written = run(monkeypatch, folder, "--whole", "--stages", "--modes", "dense,dense-rect,packed,apt", model=config)
    rows = rows_of(written["results"][0])
    for row in rows.values():
        assert {"neck", "proposal head", "box and mask heads", "rest"} <= row["stages_ms"].keys()
    heads = [rows[mode]["gflops_per_image"] - trunk_gflops(config, rows[mode]) for mode in ("dense", "packed")]
    assert heads[0] == pytest.approx(heads[1], rel=1e-3)
    assert {"if_proportional", "if_trunk_free", "with_this_trunk"} <= rows["apt 0.7"]["speed_vs_dense"].keys()


def trunk_gflops(config, row):
    """A dense trunk's, from the configuration, for 192 pixels."""
    from mmengine.config import Config

    options = {k: v for k, v in Config.fromfile(config).model.backbone.items() if k not in ("type", "thresholds")}
    model = APTEva02(**options)
    grid = (192 // model.patch_size,) * 2
    return block_gflops(PatchLayout.dense(1, grid, model.patch_size, model.window_size), model)


def test_whole_segmenters_run_with_both_heads(folder, monkeypatch):
    config = ROOT / "seg_configs/eva02_tiny_apt_photoshapes.py"
    options = ["--whole", "--stages", "--heads", "reference,fast", "--modes", "dense,packed,apt", "--batch-size", 2]
    rows = rows_of(run(monkeypatch, folder, *options, model=config)["results"][0])
    assert list(rows) == [
        f"{mode} ({head} head)" for mode in ("dense", "packed", "apt 0.7") for head in ("reference", "fast")
    ]
    assert all(len(seconds) == 1 for row in rows.values() for seconds in row["seconds"])  # one image, each its own time
    assert rows["dense (fast head)"]["gflops_per_image"] < rows["dense (reference head)"]["gflops_per_image"]
    fast = rows["apt 0.7 (fast head)"]
    assert {"speed_vs_dense (reference head)", "speed_vs_dense (fast head)"} <= fast.keys()
    assert {"neck", "head"} <= fast["stages_ms"].keys()


def test_llava_is_timed_up_to_its_tower_its_first_token_and_its_answer(folder, monkeypatch):
    monkeypatch.setattr(clock, "now", lambda device: time.thread_time())  # other processes' turns do not count
    options = ["--stages", "--keep", 0.7, "--batch-size", 2]
    results = run(monkeypatch, folder, *options, model="llava-tiny")["results"]
    names = ["vision tower", "first token", "decoding 7 more tokens", "answer of 8 tokens"]
    assert [result["title"].split(", ")[-1] for result in results] == names
    for result in results:
        rows = rows_of(result)
        assert list(rows) == ["dense", "packed", "random 0.7", "resizing 0.7", "apt 0.7"]
        assert rows["packed"]["tokens_per_image"] == 64  # 112 x 112 pixels in patches of 14
        assert rows["apt 0.7"]["tokens_per_image"] <= 0.7 * 64
    assert {"score", "layout", "embed", "trunk", "projector", "LLM prefill", "LLM decode"} <= rows["apt 0.7"][
        "stages_ms"
    ].keys()
    tower, first, decode, answer = (result["rows"][0]["seconds"][0][0] for result in results)
    assert tower < first < answer and decode == pytest.approx(answer - first, abs=1e-3)


@pytest.mark.parametrize(
    "owner, options, message",
    [
        (ReferenceEva02, ["--modes", "dense,packed"], "packed and dense differ"),
        (PatchLayout, ["--modes", "dense,packed"], "packed and dense differ"),
        (PatchLayout, ["--modes", "dense,apt", "--keep", 1, "--aspect", "1:1"], "apt 1 and dense differ"),
    ],
    ids=["dense", "packed", "adaptive without merging"],
)
def test_a_broken_model_is_not_timed(folder, monkeypatch, owner, options, message):
    method = "_to_map" if owner is ReferenceEva02 else "to_map"
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *args: right(*args) * 1.01)
    with pytest.raises(AssertionError, match=message):
        run(monkeypatch, folder, *options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--modes", "dense,fast"], "unknown modes fast"),
        (["--keep", 0.0], "above 0"),
        (["--heads", "fast,free"], "unknown heads free"),
        (["--images", "nowhere.png"], "nowhere.png"),
        (["--rounds", 0], "--rounds must be at least 1"),
        (["--blocks", 9], "has 2 blocks; --blocks takes at most as many"),
        (["--aspect", "0:0"], "0:0 is not width:height, such as 4:3"),
        (["--img-sizes", 96], "not a multiple of the attention window's, 64"),
        (["timm", "--modes", "dense"], "compare with --modes packed,apt"),
        (["timm", "--blocks", 2], "--blocks is for EVA-02's configurations"),
        (["classifier", "--whole"], "a classifier's head is one layer; leave out --whole"),
    ],
)
def test_mistakes_end_in_one_line(folder, monkeypatch, capsys, arguments, message):
    models = {"timm": timm_config(folder, "window_size=2"), "classifier": CLASSIFIER}
    model, arguments = models.get(arguments[0]), [text for text in arguments if text not in models]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, *arguments, model=model)
    assert message in str(stop.value) + capsys.readouterr().err


def test_configurations_that_are_not_there_are_named(monkeypatch):
    with pytest.raises(
        SystemExit, match=r"error: no configuration at nowhere.py; see det_configs/, seg_configs/ and cls_configs/"
    ):
        run_script(monkeypatch, TOOL, "nowhere.py")


def test_images_are_cut_and_scaled_to_the_side(folder):
    (whole,) = load_images([str(folder / "half.png")], 128, 4)
    (cut,) = load_images([str(folder / "half.png")], 128, 4, aspect=4 / 3)
    assert whole.size == (128, 77) and cut.size == (128, 96)
    no_change = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    batch = make_batch(cut, no_change, 16, 128, batch_size=2)
    assert batch.square.shape == (2, 3, 128, 128) and batch.rectangle.shape == (2, 3, 96, 128)
    assert batch.content_cells == 2 * 6 * 8 and not batch.square[:, :, 96:].any()


# What the figures mean


def test_stages_do_not_count_each_other_and_methods_are_put_back(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(clock, "now", lambda device: next(seconds))

    class Model(nn.Module):
        def forward(self):
            return self.inner() + self.inner()

        def inner(self):
            return 1

    model = Model()
    with clock.Stopwatch({"outer": [(model, "forward")], "inner": [(model, "inner")]}, torch.device("cpu")) as watch:
        assert model() == 2
    assert watch.seconds == {"outer": 3, "inner": 2}  # ticks: 0, (1, 2), (3, 4), 5
    assert not {"forward", "inner"} & vars(model).keys()


def test_memory_is_the_most_that_is_held_at_a_time():
    def function():
        for _ in range(3):
            first = torch.zeros(1_000_000)
            second = first + 1
            del first, second

    assert clock.peak_bytes(function, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_saved_activations_count_once_and_without_the_weights():
    linear = nn.Linear(10, 10)
    x = torch.randn(100, 10)
    assert clock.saved_bytes(lambda: (linear(x) + linear(x)).sum(), linear) == x.nbytes
    linear.requires_grad_(False)
    assert clock.saved_bytes(lambda: linear(x).sum(), linear) == 0


@pytest.mark.parametrize(
    "options", [dict(window_size=4, global_blocks=(1,)), dict(use_cls_token=True), dict(model="vit_tiny_patch16_224")]
)
def test_arithmetic_of_the_blocks_is_what_pytorch_counts(options):
    if "model" in options:
        trunks = TimmTrunks({**options, "img_size": 128}, torch.device("cpu"))
    else:
        trunks = Eva02Trunks(dict(img_size=128, embed_dim=48, depth=2, num_heads=3, **options))
    dense, packed = trunks.reference(), core(trunks.packed)
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        dense(images)  # resamples positions, once
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            dense(images)
        with FlopCounterMode(display=False) as embedding:
            packed.patch_embed.proj(images)
        counted = (counter.get_total_flops() - embedding.get_total_flops()) / 1e9
        assert block_gflops(packed.layout(images), packed) == pytest.approx(counted, rel=1e-6)


def test_bounds_are_amdahls_law():
    """A trunk of 6 and a head of 4 seconds; half of the tokens, at 4 seconds, scoring included."""
    dense = Case("dense", None, True, work={"trunk": 100}, gflops={"whole": 10.0}, stages=[{"trunk": 6, "head": 4}])
    stages = [{"score": 1, "trunk": 3, "head": 5}]
    apt = Case("apt", None, work={"trunk": 50}, gflops={"whole": 8.0}, stages=stages)
    assert report.bounds(apt, dense, "whole", None) == {
        "by_arithmetic": 1.25,
        "if_proportional": round(10 / (3 + 4), 3),
        "if_trunk_free": 2.5,
        "with_this_trunk": round(10 / (4 + 4), 3),
    }


def test_the_stage_table_compares_with_the_dense_model_of_the_same_head():
    def speed(expected):
        return {"median": 1.0, "min": 1.0, "max": 1.0, "if_proportional": expected}

    rows = [
        {"mode": "apt (reference head)", "stages_ms": {"head": 5.0}, "speed_vs_dense (reference head)": speed(1.25)},
        {
            "mode": "apt (fast head)",
            "stages_ms": {"head": 2.0},
            "speed_vs_dense (reference head)": speed(2.5),
            "speed_vs_dense (fast head)": speed(1.5),
        },
        {"mode": "apt-rect", "stages_ms": {}, "speed_vs_dense": {"median": 1.0, "min": 1.0, "max": 1.0}},
    ]
    columns = {column.header: list(column.cells) for column in report.stage_table(rows, "title").columns}
    assert columns["if proportional"] == ["1.25x", "1.50x", "-"]


def test_the_one_hot_scorer_computes_the_same_entropies():
    images = torch.rand(1, 3, 128, 192) * 255
    ours, theirs = score_patches(images, (32, 64)), scorers.one_hot_entropy(images, (32, 64))
    for size in (32, 64):
        torch.testing.assert_close(ours[size], theirs[size], rtol=0, atol=1e-4)
    flat = scorers.one_hot_entropy(torch.full((1, 3, 64, 64), 7.0), (64,))[64]
    assert math.isclose(float(flat), 0, abs_tol=1e-6)


def test_scorers_are_timed_and_plotted(tmp_path, monkeypatch):
    options = ["--scorers", "--device", "cpu", "--img-sizes", 256, "--rounds", 1, "--num-images", 1]
    files = ["--json", tmp_path / "scorers.json", "--plot", tmp_path / "scorers.png"]
    run_script(monkeypatch, TOOL, *options, *files)
    (result,) = json.loads((tmp_path / "scorers.json").read_text())["results"]
    assert [row["mode"] for row in result["rows"]] == ["one-hot", "score_patches"]
    assert (tmp_path / "scorers.png").stat().st_size > 1000


# Compilers and GPUs


@pytest.mark.slow
def test_compiled_models_are_checked_and_timed_like_others(folder, monkeypatch):
    modes = ["--modes", "dense,packed,apt", "--compile"]
    assert len(run(monkeypatch, folder, *modes)["results"][0]["rows"]) == 3
    assert len(run(monkeypatch, folder, *modes, model="llava-tiny")["results"]) == 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [["--stages"], ["--compile"], ["--train-step"], ["--keep", 1.0, 0.5, "--img-sizes", 64, 128]], ids=str
)
def test_on_a_gpu_trunks_are_checked_and_timed(folder, monkeypatch, options):
    options = ["--device", "cuda", "--dtype", "bf16", "--batch-size", 2, *options]
    for result in run(monkeypatch, folder, *options)["results"]:
        assert all(row["peak_gb"] > 0 and row["ms"] > 0 for row in result["rows"])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--stages"], ["--compile"]], ids=str)
def test_on_a_gpu_llava_is_checked_and_timed(folder, monkeypatch, options):
    options = ["--device", "cuda", "--dtype", "bf16", "--batch-size", 2, *options]
    assert len(run(monkeypatch, folder, *options, model="llava-tiny")["results"]) == 4


@pytest.mark.gpu
def test_on_a_gpu_scorers_are_checked_and_timed(folder, monkeypatch):
    options = ["--scorers", "--device", "cuda", "--img-sizes", 256, "--rounds", 1, "--images", folder / "half.png"]
    run_script(monkeypatch, TOOL, *options)


# Machines without the OpenMMLab toolboxes

BARE = """
import importlib.machinery, runpy, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_missing = name.split(".")[0] in ("mmcv", "mmdet", "mmseg", "lmms_eval")
        return None if is_missing else super().find_spec(name, path, target)

sys.meta_path = [Finder if x is importlib.machinery.PathFinder else x for x in sys.meta_path]
"""


def test_without_mmcv_trunks_llava_and_the_gpu_tests_run(folder):
    """In a process that finds neither mmcv nor mmdet, mmseg and lmms-eval."""
    from tests.llava_tiny import stock_config

    stock_config().save_pretrained(folder / "llava")
    run = "runpy.run_path('tools/benchmark.py', run_name='__main__')"
    collect = "pytest.main(['-m', 'gpu', '--collect-only', '-p', 'no:cacheprovider'])"
    code = f"import pytest\n{BARE}\n{run}\nassert {collect} == 0\nsys.argv.append('--whole')\n{run}"
    configs = ["det_configs/eva02_tiny_apt_photoshapes.py", "seg_configs/eva02_tiny_apt_photoshapes.py"]
    options = ["--images", folder / "half.png", "--device", "cpu", "--rounds", 1]
    command = [sys.executable, "-c", code, *configs, folder / "llava", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)

    for words in (
        "192 px",
        "80 px",
        "first token",
        "test_gpu_kernels_equal_float32",
        "not installed here (mmcv, mmdet",
    ):
        assert words in finished.stdout, finished.stderr
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "error: a whole model needs mmcv with its operators" in finished.stderr


# Everything at once


STUB = """
import shutil, sys, time

if "slow" in sys.argv:
    time.sleep(600)
if "wrong" in sys.argv:
    sys.exit("error: no file nowhere.py")
shutil.copy("{report}", sys.argv[sys.argv.index("--json") + 1])
"""


def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--modes", "dense,apt")
    (folder / "stub.py").write_text(STUB.format(report=folder / "b.json"))
    monkeypatch.setattr(all_parts, "TOOL", folder / "stub.py")
    parts = (all_parts.Part("slow", "slow", 0.02), all_parts.Part("wrong", "wrong", 5), all_parts.Part("right", "x", 5))
    monkeypatch.setattr(all_parts, "CPU_PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(folder / "out")])
    with pytest.raises(SystemExit) as stop:
        all_parts.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 1
    assert "slow failed: stopped after 0.02 minutes" in printed and "wrong failed: error: no file nowhere.py" in printed
    summary = (folder / "out" / "summary.md").read_text()
    assert "apt 0.7" in summary and "x dense" in summary and "| wrong |" not in summary


@pytest.mark.parametrize("part", [*all_parts.CPU_PARTS, *all_parts.GPU_PARTS], ids=lambda part: part.name)
def test_the_parts_are_valid_commands(part, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *part.arguments.split()])
    args = benchmark.parse_args()
    for config in args.configs:
        assert (ROOT / config).exists() or config in LLAVA_SHAPES
