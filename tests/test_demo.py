"""The demo: its page, its pictures, and that an interrupted run resumes."""

import json
import re
import shlex
import signal
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from examples.demo import page_of
from examples.demo_page import data_uri, render, share_histogram, training_curve
from examples.demo_pictures import CLASS_COLORS, class_legend, detections, label_map, spread
from examples.report import AFTER, DENSE
from tests.scripts import ENVIRONMENT, ROOT, data_options, evaluator_options, run_script, wait_for
from tools.results import Result

# ------------------------------------------------------------------------------------------- pictures


def test_images_are_picked_by_rank():
    values = [0.9, 0.1, 0.5, 0.3, 0.7]
    assert [values[i] for i in spread(values, 5)] == sorted(values)
    assert [values[i] for i in spread(values, 2)] == [0.3, 0.7]
    assert spread([1.0], 4) == [0]


def test_label_maps_tint_what_is_not_background():
    grey = Image.new("RGB", (64, 48), (100, 100, 100))
    labels = np.zeros((48, 64), int)
    labels[:, 32:] = 1
    drawn = np.asarray(label_map(grey, labels, ("background", "star")))
    assert drawn.shape == (480, 640, 3)
    assert (drawn[:, :270] == 100).all()
    assert (drawn[:, 370:] == np.round(0.4 * 100 + 0.6 * np.array(CLASS_COLORS[1]))).all()
    assert [entry["label"] for entry in class_legend(("background", "star"))["entries"]] == ["star"]


def test_boxes_lie_where_the_objects_are():
    grey = Image.new("RGB", (64, 48), (100, 100, 100))
    nothing = np.zeros((1, 48, 64), bool)
    drawn = detections(grey, np.array([[16.0, 24.0, 48.0, 40.0]]), np.array([2]), nothing, ["triangle 0.90"])
    is_line = (np.asarray(drawn) == CLASS_COLORS[2]).all(-1)
    assert is_line[300, 160] and is_line[300, 480] and is_line[400, 300]  # left, right, bottom, ten times as large
    assert not is_line[300, 300] and not is_line[410:].any()


# ------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Sources of all images, links to other files, and the text."""

    def __init__(self, html):
        super().__init__()
        self.images, self.links, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.images += [attributes["src"]] if tag == "img" else []
        self.links += [
            attributes[name] for name in ("href", "src") if not attributes.get(name, "#").startswith(("#", "data:"))
        ]

    def handle_data(self, data):
        self.text += data


def example_page(**changes):
    page = {
        "title": "A & B",
        "intro": "Two sentences.",
        "tiles": [{"value": "73%", "label": "kept"}],
        "table": {"head": ["", "mAP"], "rows": [{"is_apt": True, "cells": ["APT", "65.5"]}]},
        "measured_on": "a few images",
        "methods": [("dense", "unchanged")],
        "speed": "Measured.",
        "machine": [("hardware", "a processor")],
        "charts": [{"title": "Curve", "svg": training_curve([1, 2], [3.0, 2.5]), "caption": "Loss."}],
        "pictures_text": "By rank.",
        "legends": [class_legend(("star",))],
        "pictures": [
            {
                "caption": "An image.",
                "panels": [{"label": "patches", "uri": data_uri(Image.new("RGB", (8, 8)))}],
                "answers": [{"question": "How many?", "truth": "2", "dense": "2", "apt": "<3>"}],
            }
        ],
        "next_text": "Then:",
        "next": "python tools/train.py config.py",
        "command": "examples/demo.py det",
        "date": "2026-01-01",
    }
    return render({**page, **changes})


def test_the_page_needs_no_other_file():
    page = Page(example_page())
    assert page.images and all(source.startswith("data:image/jpeg;base64,") for source in page.images)
    assert page.links == []
    for expected in ("A & B", "65.5", "✓ 2", "✗ <3>", "python tools/train.py config.py"):
        assert expected in page.text


def test_charts_take_the_pages_text_color():
    for chart in (training_curve([1, 2, 3], [3.0, 2.0, 1.0]), share_histogram([0.4, 0.7, 0.9], 0.7)):
        assert chart.startswith("<svg") and chart.rstrip().endswith("</svg>")
        assert "currentColor" in chart and "#123456" not in chart
        assert not re.search(r"<svg[^>]*\s(width|height)=", chart)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", chart[: chart.index(">")])


@pytest.mark.parametrize("task", ["det", "seg", "llava"])
def test_the_page_of_a_run_says_what_was_found(task):
    results = [
        Result("run", DENSE, {"mAP": 66.4}, 576.0, 1.0, 1.0, 13.0, 1.0),
        Result("run", AFTER, {"mAP": 65.5}, 372.8, 0.745, 0.258, 14.3, 1.1),
    ]
    content = {
        "what": "detector",
        "results": results,
        "losses": [(1, 3.0), (60, 2.5)],
        "shares": [0.4, 0.7, 0.9],
        "budget": 0.7,
        "real_size": {"what": "EVA-02-B", "kept": 0.7, "median": 1.5, "min": 1.4, "max": 1.6},
        "minutes_short_finetune": 0.9,
        "measured_on": "a few images",
        "speed_text": "Measured.",
        "hardware": "a processor",
        "versions": {"torch": "2.13"},
        "scorer": "laplacian",
        "thresholds": {16: 0.01541, 32: 0.0046228},
        "legends": [],
        "pictures": [],
        "next": "python tools/train.py config.py",
    }
    page = Page(render(page_of(task, content, "examples/demo.py det")))
    for expected in (
        "laplacian score is below 0.01541 at 16 px, 0.0046228 at 32 px",
        "66.4 → 65.5",
        "1.50 times as fast",
    ):
        assert expected in page.text


def test_the_commands_on_the_page_exist():
    from examples import demo_llava, demo_mm

    for commands in (*demo_mm.NEXT.values(), demo_llava.NEXT):
        for command in commands.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)[1:]
            if program == "-m" and arguments.pop(0) == "lmms_eval":
                continue
            source = ROOT / ("llava_apt/finetune.py" if program == "-m" else program)
            known = source.read_text() + (ROOT / "tools/mm_config.py").read_text()
            for argument in arguments:
                assert not argument.startswith("--") or f'"{argument}"' in known, command
                assert not re.match(r"\w+_configs/", argument) or (ROOT / argument).is_file(), command


# ------------------------------------------------------------------------------------------- whole runs


def arguments(task, data, out, folder):
    """Of a demo of a minute."""
    command = [sys.executable, "examples/demo.py", task, "--out", out, "--pictures", "2"]
    if task == "llava":
        return [*command, "--data", data, "--limit", "100", "--dense", folder]
    options = {**data_options(data), "train_dataloader.batch_size": 2, "train_cfg.max_iters": 6}
    options |= evaluator_options(data) if task == "det" else {}
    return [*command, "--cfg-options", *(f"{name}={value}" for name, value in options.items())]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["det", "seg", "llava"])
def test_a_stopped_demo_resumes_and_repeats_nothing(task, photoshapes, checkpoint, tmp_path):
    """Killed in the short fine-tune, interrupted between evaluations, then finished, and started once more."""
    command, folder = arguments(task, photoshapes, tmp_path, checkpoint), tmp_path / task
    steps, begun = folder / "steps", ("iter_2.pth", "checkpoint-*/trainer_state.json")
    first = "thresholds" if task == "llava" else "thresholds_apt"

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)

    with start() as process:
        wait_for(process, lambda: any(list(folder.glob(f"*/{name}")) for name in begun))
        process.send_signal(signal.SIGKILL)
    assert [path.stem for path in steps.iterdir()] == [first] and not (folder / "index.html").exists()

    with start() as process:
        wait_for(process, lambda: len(list(steps.glob("*.json"))) >= 3)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 1 and said.endswith("interrupted; the same command resumes\n")
    assert "continued" in said or "kept  short fine-tune" in said
    kept = {path.name: path.stat().st_mtime_ns for path in steps.glob("*.json")}

    with start() as process:
        said = process.stderr.read()
    assert process.returncode == 0 and f"Done: open {folder / 'index.html'}" in said.splitlines()[-1]
    assert {name: (steps / name).stat().st_mtime_ns for name in kept} == kept
    page = Page((folder / "index.html").read_text())
    assert len(page.images) == 2 * {"det": 3, "seg": 4, "llava": 1}[task] and not page.links
    assert re.search(r"At a real size .* was \d\.\d\d times as fast", page.text)

    with start() as process:
        said = process.stderr.read()
    assert process.returncode == 0 and "doing" not in said
    assert Page((folder / "index.html").read_text()).text == page.text

    # With another budget no step is taken over.
    with subprocess.Popen([*command, "--removed", "0.1"], cwd=ROOT, env=ENVIRONMENT) as process:
        wait_for(process, lambda: json.loads((steps / f"{first}.json").read_text())["inputs"]["removed"] == 0.1)
        wait_for(process, lambda: len(list(folder.glob("*-*/"))) == 2)  # another short fine-tune
        process.send_signal(signal.SIGKILL)


def test_the_demo_of_a_pretrained_vit(tmp_path, monkeypatch):
    weights = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    chance = np.random.default_rng(0)
    for number, height in enumerate((120, 200)):
        pixels = chance.integers(0, 255, (height, 160, 3), np.uint8)
        pixels[:, :80] = chance.integers(0, 255, (height // 40, 2, 3)).repeat(40, 0).repeat(40, 1)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    arguments = ["--model", "test_vit", "--weights", tmp_path / "vit.safetensors", "--images", tmp_path / "0.png"]
    arguments += [tmp_path / "1.png", "--resize", 192, "--keep", 0.7, "--out", tmp_path / "out"]
    run_script(monkeypatch, "examples/demo_vit.py", *arguments)
    page = Page((tmp_path / "out/index.html").read_text())
    assert len(page.images) == 2 * 4 and not page.links
    assert re.search(r"dense\d+100.0%1.0001.00x", page.text) and re.search(r"\d\d%of the tokens kept", page.text)
    own = [*arguments[:-1], tmp_path / "again", "--scorer", tmp_path / "out/scorer.safetensors"]
    run_script(monkeypatch, "examples/demo_vit.py", *own)
    assert (tmp_path / "again/index.html").is_file() and not (tmp_path / "again/scorer.safetensors").exists()
