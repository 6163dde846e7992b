"""The short fine-tune when it is killed, when a disk is full, and in several processes: it goes on, or says why not."""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from llava_apt import finetune
from llava_apt.run_folder import last_checkpoint

from .llava_tiny import finetune_options, photo
from .processes import end, environments, fork, preload

preload("tests.llava_tiny", "llava_apt.finetune")
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # what auditing tells of
numbers = itertools.count()


def _work(options, log, environment, dies_at_write, largest_file):
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    output = options[options.index("--output-dir") + 1]
    writes = 0

    def count(event, arguments):
        nonlocal writes
        if event in WRITES and str(arguments[0]).startswith(output) and (event != "open" or arguments[1] != "r"):
            writes += 1
            if writes == dies_at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    if dies_at_write:
        sys.addaudithook(count)
    sys.argv = ["finetune", *options]
    finetune.main()


def start(task, output, *more, environment=(), dies_at_write=None, largest_file=None):
    log = output.parent / f"{next(numbers)}.log"
    options = finetune_options(task, output, *more)
    process = fork.Process(target=_work, args=(options, log, dict(environment), dies_at_write, largest_file))
    process.start()
    process.log = log
    return process


def run(task, output, *more, **how) -> None:
    process = start(task, output, *more, **how)
    assert end(process) == 0, process.log.read_text()


def new_layers(output):
    return load_file(output / "apt_new_layers.safetensors")


def assert_same_result(result, expected):
    for name, tensor in new_layers(expected).items():
        assert torch.equal(new_layers(result)[name], tensor), name


@pytest.fixture(scope="module")
def uninterrupted(task, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    run(task, output, "--save_steps", "1")
    return output


# ---------------------------------------------------------------------------------------- kills


def test_a_run_that_is_killed_while_it_writes_ends_as_if_it_had_not_been(task, uninterrupted, tmp_path):
    """Killed at writes here and there, up to eight times in a row; each time the last checkpoint is a whole one."""
    output = tmp_path / "run"
    places = random.Random(0)
    kills, steps = 0, []
    while kills < 8:
        process = start(task, output, "--save_steps", "1", "--resume", dies_at_write=places.randint(1, 14))
        code = end(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.log.read_text()
        kills += 1
        if checkpoint := last_checkpoint(output):
            steps.append(int(checkpoint.name.rpartition("-")[2]))
            assert load_file(checkpoint / "model.safetensors").keys() == new_layers(uninterrupted).keys()
            assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert kills >= 5 and steps == sorted(steps)
    run(task, output, "--save_steps", "1", "--resume")
    assert_same_result(output, uninterrupted)
    assert not (output / ".unfinished").exists()


def test_a_run_that_is_killed_at_any_time_ends_as_if_it_had_not_been(task, uninterrupted, tmp_path):
    output = tmp_path / "run"
    moments = random.Random(1)
    for _ in range(3):
        process = start(task, output, "--save_steps", "1", "--resume")
        process.join(moments.uniform(0.1, 2.0))
        process.kill()
        end(process)
    run(task, output, "--save_steps", "1", "--resume")
    assert_same_result(output, uninterrupted)


def test_a_run_that_is_killed_before_it_saves_never_gives_an_older_runs_weights(task, uninterrupted, tmp_path):
    output = tmp_path / "run"
    run(task, output, "--save_steps", "1")
    another = ("--learning-rate", "3e-2", "--save_steps", "5")
    process = start(task, output, *another)
    assert end(process) == 1 and "already holds finetune_run.json" in process.log.read_text()
    process = start(task, output, *another, "--overwrite", dies_at_write=12)
    assert end(process) == -signal.SIGKILL
    assert not (output / "apt_new_layers.safetensors").exists() and not list(output.glob("checkpoint-*"))
    code = end(start(task, output, *another, "--resume"))
    if code:  # killed between the old settings and the new ones
        run(task, output, *another, "--overwrite")
    run(task, tmp_path / "alone", *another)
    assert_same_result(output, tmp_path / "alone")
    assert not torch.equal(*(next(iter(new_layers(folder).values())) for folder in (output, uninterrupted)))


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(task, uninterrupted, tmp_path):
    output = tmp_path / "run"
    while last_checkpoint(output) is None:
        process = start(task, output, "--save_steps", "1", "--resume")
        while process.is_alive() and last_checkpoint(output) is None:
            time.sleep(0.01)
        process.kill()
        end(process)
    before = {path: path.read_bytes() for path in last_checkpoint(output).iterdir()}
    for largest_file in (15_000, 30_000):  # within the weights' file, within the optimizer's
        process = start(task, output, "--save_steps", "1", "--resume", largest_file=largest_file)
        assert end(process) == 1
        last_line = process.log.read_text().strip().splitlines()[-1]
        assert "could not be saved" in last_line and "is whole" in last_line and "Traceback" not in last_line
        assert all(path.read_bytes() == content for path, content in before.items())
    run(task, output, "--save_steps", "1", "--resume")
    assert_same_result(output, uninterrupted)


# ---------------------------------------------------------------------------------------- messages


def test_what_a_loaders_process_finds_out_is_one_line_too(task, tmp_path):
    """Such a process hands on its traceback."""
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "data.json").write_text(json.dumps([record(0, "bad.png", words=1)]))
    more = ["--data", tmp_path / "data.json", "--image-folder", tmp_path, "--dataloader_num_workers", "1", "--strict"]
    process = start(task, tmp_path / "run", *more)
    assert end(process) == 1 and "Traceback" not in process.log.read_text()
    last_line = process.log.read_text().strip().splitlines()[-1]
    assert "error: ValueError: 1 bad records, 0 are allowed; r0: unreadable image" in last_line
    report = json.loads((tmp_path / "run" / "bad_records.json").read_text())
    assert report["left_out"] == [{"id": "r0", "reason": "unreadable image"}]


# ---------------------------------------------------------------------------------------- several processes


def start_several(task, output, processes, *more):
    for environment in environments(processes):
        yield start(task, output, "--ddp_backend", "gloo", *more, environment=environment)


def record(index, image, words):
    question = ("<image>\n" if image else "") + " ".join(["what"] * words)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    return {"id": f"r{index}", **({"image": image} if image else {}), "conversations": turns}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("others", ["text only", "nothing merges"])
def test_several_processes_train_as_one_does_whatever_half_of_them_get(task, tmp_path, others, processes):
    """SGD's steps are the gradients, here summed over six steps of four samples: two with images that merge, and,
    on other processes, two without images or with images in which nothing merges."""
    (tmp_path / "images").mkdir()
    records = []
    for index in range(4):
        merges = index < 2
        name = f"{index}.png" if merges or others == "nothing merges" else None
        if name:
            photo(index, size=(112, 112), flat=0.5 if merges else 0).save(tmp_path / "images" / name)
        records.append(record(index, name, words=9 - index))  # longer ones come first in a batch
    (tmp_path / "data.json").write_text(json.dumps(records))
    more = ["--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--optim", "sgd"]
    more += ["--learning-rate", "1", "--max_grad_norm", "0"]
    more += ["--num_train_epochs", "6", "--lr_scheduler_type", "constant"]
    one, several = tmp_path / "one", tmp_path / "several"
    started = list(start_several(task, several, processes, *more, "--device-batch-size", 4 // processes))
    run(task, one, *more, "--device-batch-size", "4")
    assert [end(process) for process in started] == [0] * processes, started[0].log.read_text()
    start_values = tmp_path / "start"
    run(task, start_values, *more, "--learning-rate", "0", "--device-batch-size", "4")
    for name, begun in new_layers(start_values).items():
        expected, result = new_layers(one)[name] - begun, new_layers(several)[name] - begun
        assert expected.abs().max() > 0
        assert (result - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_a_killed_process_ends_the_other_one_and_one_alone_can_go_on(task, tmp_path):
    output, more = tmp_path / "run", ("--save_steps", "1", "--num_train_epochs", "6")
    first, second = start_several(task, output, 2, *more)
    deadline = time.time() + 60
    while last_checkpoint(output) is None:
        assert time.time() < deadline and first.is_alive(), first.log.read_text()
        time.sleep(0.01)
    second.kill()
    end(second)
    assert end(first, timeout=60) not in (0, None)
    run(task, output, *more, "--resume")
    assert last_checkpoint(output).name == "checkpoint-42"
