"""Results of runs side by side, read from what the toolboxes, lmms-eval and this project's tools leave behind."""

import json
import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

import apt_backbones.mm.seg  # noqa: F401
from tests.scripts import ROOT, data_options
from tools import compare


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def run(*arguments):
    command = [sys.executable, "tools/compare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def tested(tmp_path):
    """Two runs of tools/test.py; of the second there is an older test, too."""
    metrics = {"coco/bbox_mAP": 0.6, "coco/bbox_mAP_s": -1.0, "tokens": 576.0, "content_kept": 1.0, "time": 0.5}
    write(tmp_path / "dense" / "1" / "1.json", metrics)
    changed = {"coco/bbox_mAP": 0.59, "tokens": 400.0, "content_kept": 0.7, "time": 0.25}
    write(tmp_path / "apt" / "1" / "1.json", metrics)
    write(tmp_path / "apt" / "2" / "2.json", {**metrics, **changed})
    write(tmp_path / "apt" / "2" / "vis_data" / "config.py", "test_dataloader = dict(batch_size=2)")
    return tmp_path


def test_tests_are_compared_with_the_first(tested):
    dense, apt = compare.compare([compare.read_run(tested / name) for name in ("dense", "apt")])
    assert dense.metrics == {"box mAP": 60.0} and dense.speed == 2 and dense.differences == {}
    assert apt.metrics == {"box mAP": pytest.approx(59)}
    assert apt.differences == {"box mAP": pytest.approx(-1)}
    assert (apt.tokens, apt.content_kept, apt.speed, apt.relative_speed) == (400, 0.7, 8, 4)


def test_the_command_prints_a_table_and_writes_json(tested):
    done = run(tested / "dense", tested / "apt", "--json", tested / "new" / "out.json")
    assert done.returncode == 0, done.stderr
    head, _, dense, apt = (line[2:-2].split(" | ") for line in done.stdout.splitlines())
    assert head == ["run", "box mAP", "tokens", "content tokens kept", "per second", "relative speed"]
    assert dense[1:] == ["60.00", "576.0", "100.0%", "2.00", ""]
    assert apt[1:] == ["59.00 (-1.00)", "400.0", "70.0%", "8.00", "4.00x"]
    assert [line["tokens"] for line in json.loads((tested / "new" / "out.json").read_text())] == [576, 400]


def test_the_last_validation_of_a_training_counts(tmp_path):
    training = {"loss": 1.0, "lr": 0.1, "iter": 1, "step": 1, "time": 0.1}
    lines = [training, {"mIoU": 80.0, "content_kept": 0.7, "step": 1}, training, {"mIoU": 85.0, "step": 2, "time": 0.1}]
    write(tmp_path / "1" / "vis_data" / "scalars.json", "\n".join(map(json.dumps, lines)))
    write(tmp_path / "2" / "vis_data" / "scalars.json", json.dumps(training))  # resumed, and stopped again
    (result,) = compare.read_run(tmp_path)
    assert result.metrics == {"mIoU": 85.0} and result.speed == pytest.approx(10)
    write(tmp_path / "1" / "vis_data" / "config.py", "test_dataloader = None\nval_dataloader = dict(batch_size=2)")
    assert compare.read_run(tmp_path)[0].speed == pytest.approx(20), "batches of the validation"


def test_of_a_test_and_a_later_training_the_later_counts(tested):
    """Of a training that was killed while it wrote a line, those before."""
    validation = {"coco/bbox_mAP": 0.62, "step": 1, "time": 0.1}
    write(tested / "apt" / "3" / "vis_data" / "scalars.json", json.dumps(validation) + '\n{"loss": 0.1, "l')
    assert compare.read_run(tested / "apt")[0].metrics == {"box mAP": 62.0}
    write(tested / "apt" / "4" / "4.json", {"coco/bbox_mAP": 0.63})
    write(tested / "apt" / "4" / "vis_data" / "scalars.json", json.dumps({"coco/bbox_mAP": 0.63, "step": 0}))
    assert compare.read_run(tested / "apt")[0].metrics == {"box mAP": 63.0}


def test_a_batch_that_is_not_full_counts_as_it_is(tested):
    write(tested / "apt" / "3" / "3.json", {"coco/bbox_mAP": 0.6, "time": 0.25, "images_per_batch": 1.5})
    write(tested / "apt" / "3" / "vis_data" / "config.py", "test_dataloader = dict(batch_size=2)")
    (result,) = compare.read_run(tested / "apt")
    assert result.speed == 6 and result.metrics == {"box mAP": 60.0}


def test_a_metric_of_nothing_is_shown_and_one_that_was_not_measured_is_not():
    assert compare.metrics_of({"coco/bbox_mAP": 0.0, "coco/bbox_mAP_s": -1.0, "lr": 0.1}) == {"box mAP": 0.0}


def test_metrics_of_other_tasks_are_shown_as_they_are(tmp_path):
    write(
        tmp_path / "1" / "1.json", {"accuracy/top1": 71.0, "time": 0.1, "images_per_batch": 1, "padding_kept_max": 1.0}
    )
    assert compare.read_run(tmp_path)[0].metrics == {"accuracy/top1": 71.0}


def test_a_run_of_another_task_is_compared_with_its_own_first_line():
    def line(run, method, metric, speed):
        return compare.Result(run, method, {metric: 50.0}, speed=speed)

    detection = [line("det", "dense", "box mAP", 10.0), line("det", "apt", "box mAP", 12.0)]
    segmentation = [line("seg", "dense", "mIoU", 4.0), line("seg", "apt", "mIoU", 6.0)]
    assert [result.relative_speed for result in compare.compare([detection, segmentation])] == [None, 1.2, None, 1.5]


def test_lmms_evals_results(tmp_path):
    results = {
        "gqa": {"alias": "gqa", "exact_match,none": 0.61, "exact_match_stderr,none": "N/A"},
        "mme": {"total,none": 1500},
    }
    throughput = {"avg_speed": 57.9, "avg_tokens_per_image": 400.0, "avg_seconds_per_sample": 0.25}
    write(tmp_path / "llava" / "20260101_results.json", {"results": results, "throughput": throughput})
    (result,) = compare.read_run(tmp_path)
    assert result.metrics == {"gqa exact_match": 0.61, "mme total": 1500}
    assert (result.tokens, result.speed) == (400, 4)


@pytest.mark.parametrize("task", ["det", "seg", "vqa"])
def test_committed_tables(task):
    """Methods of two tables are compared each with itself, and those of one with its first line."""
    path = ROOT / f"docs/results/photoshapes_{task}.json"
    first, second = compare.read_run(path), compare.read_run(path)
    lines = compare.compare([first, second])
    assert all(line.relative_speed in (1, None) and not any(line.differences.values()) for line in second)
    assert lines[0].method == "dense" and lines[0].content_kept == 1
    apt = next(line for line in first if line.method.startswith("APT"))
    for title, difference in apt.differences.items():
        assert difference == pytest.approx(apt.metrics[title] - lines[0].metrics[title])
    assert apt.relative_speed == pytest.approx(apt.speed / lines[0].speed) and apt.content_kept < 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty", None, "no results in"),
        ("missing", None, "no run at"),
        ("other.json", {"rows": [{"title": "dense"}]}, "is not a table of"),
        ("cut.json", '{"rows": [', "is not a table of"),
        ("none.json", {"rows": []}, "is not a table of"),
        ("plot.png", b"\x89PNG", "is not a table of"),
    ],
)
def test_what_holds_no_results_is_named_in_one_line(name, content, message, tmp_path):
    (tmp_path / "empty").mkdir()
    if content:
        write(tmp_path / name, content)
    done = run(tmp_path / name)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line and name in line


def test_a_real_test_is_read(tmp_path, photoshapes):
    """What mmengine writes today has the metrics that the run returns."""
    cfg = Config.fromfile(ROOT / "seg_configs/eva02_tiny_apt_photoshapes.py")
    cfg.merge_from_dict(data_options(photoshapes))
    cfg.update(work_dir=str(tmp_path / "run"), load_from=None, log_level="WARNING", experiment_name="compared")
    metrics = RUNNERS.build(cfg).test()
    (result,) = compare.read_run(tmp_path / "run")
    assert result.metrics["mIoU"] == pytest.approx(metrics["mIoU"])
    assert result.content_kept == metrics["content_kept"] and result.tokens == metrics["tokens"]
    assert result.speed > 0
