"""Damaged and hostile files, and runs that are not the one in the folder: refused in one line, and never executed."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_apt import LlavaAptForConditionalGeneration, load_new_layers, save_new_layers
from llava_apt.run_folder import MANIFEST, RUN_FILE, content_of

from .llava_tiny import run_finetune as run
from .llava_tiny import save_hub_checkpoint, stock_model


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def begun(finished, tmp_path):
    output = tmp_path / "begun"
    shutil.copytree(finished / "checkpoint-3", output / "checkpoint-3")
    shutil.copy(finished / RUN_FILE, output)
    return output


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------- checkpoints of a run

STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*STATE, MANIFEST, "unreadable.json"])
def test_a_checkpoint_that_lacks_a_file_is_not_resumed(task, begun, name):
    (begun / "checkpoint-3" / name).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-3 cannot be resumed: .*{name}.*; delete this folder") as error:
        run(task, begun, "--resume")
    one_line(error)


@pytest.mark.parametrize("name", [*STATE, MANIFEST])
@pytest.mark.parametrize("content", ["half", "noise"])
def test_a_damaged_checkpoint_is_not_resumed(task, begun, name, content):
    path = begun / "checkpoint-3" / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "half" else b"\x80" * len(data))
    with pytest.raises(ValueError, match="checkpoint-3 cannot be resumed: ") as error:
        run(task, begun, "--resume")
    one_line(error)


@pytest.mark.parametrize("name", STATE[:3])
@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_code_in_a_checkpoint_is_not_executed(task, begun, tmp_path, name, protocol):
    """The list of sizes is the attacker's, too."""
    path = begun / "checkpoint-3" / name
    if protocol == "zip":
        torch.save({"state": Touches(tmp_path / "executed"), "param_groups": []}, path)
    else:
        path.write_bytes(pickle.dumps(Touches(tmp_path / "executed")))
    sizes = json.loads((begun / "checkpoint-3" / MANIFEST).read_text())
    (begun / "checkpoint-3" / MANIFEST).write_text(json.dumps({**sizes, name: path.stat().st_size}))
    with pytest.raises(ValueError, match="checkpoint-3 cannot be resumed: ") as error:
        run(task, begun, "--resume")
    assert "weights_only" not in one_line(error) and not (tmp_path / "executed").exists()
    if protocol == "zip":
        assert "system" in one_line(error)


def test_a_planted_file_and_another_step_are_noticed(task, begun, tmp_path):
    planted = begun / "checkpoint-3" / "pytorch_model.bin"
    torch.save(Touches(tmp_path / "executed"), planted)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was added"):
        run(task, begun, "--resume")
    planted.unlink()
    (begun / "checkpoint-3").rename(begun / "checkpoint-7")  # would end the run with the weights of step 3
    with pytest.raises(ValueError, match=r"trainer_state\.json is of another step"):
        run(task, begun, "--resume")
    assert not (tmp_path / "executed").exists()


def test_weights_that_the_run_does_not_train_are_not_resumed(task, begun):
    weights = begun / "checkpoint-3" / "model.safetensors"
    tensors = load_file(weights)
    renamed = {name.replace("conv_down", "conv_DOWN"): tensor for name, tensor in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other trained layers, see model\.vision_tower\.adaptive_embed"):
        run(task, begun, "--resume")


# ---------------------------------------------------------------------------------------- which run a folder is of


@pytest.mark.parametrize(
    "more, message",
    [
        (["--learning-rate", "2e-2"], r"--learning-rate 0\.01 \(now 0\.02\)"),
        (["--train", "projector"], r"--train new \(now projector\)"),
        (["--threshold", "56=1"], r"--threshold \{'28': 2\.0\} \(now \{'28': 2\.0, '56': 1\.0\}\)"),
        (["--fraction", "0.5"], r"--fraction 1\.0 \(now 0\.5\)"),
        (["--total-batch-size", "8"], r"--total-batch-size 4 \(now 8\)"),
        (["--max-length", "100"], r"--max-length 2048 \(now 100\)"),
        (["--crop"], r"--crop False \(now True\)"),
        (["--num_train_epochs", "2"], r"--num-train-epochs 1 \(now 2"),
        (["--seed", "7"], r"--seed 42 \(now 7\)"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(task, begun, more, message):
    with pytest.raises(ValueError, match=f"begun holds a run with .*{message}.*resume it with the same") as error:
        run(task, begun, "--resume", *more)
    one_line(error)


def test_a_run_is_not_resumed_with_other_data_or_another_model(task, begun, tmp_path):
    records = json.loads((task / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[::-1]))
    with pytest.raises(ValueError, match=r"--data sha256:\w+ \(now sha256:\w+\)"):
        run(task, begun, "--resume", "--data", tmp_path / "data.json")
    shutil.copytree(task, tmp_path / "moved")
    (tmp_path / "moved" / "3.png").unlink()  # the order of the others would shift
    with pytest.raises(ValueError, match=r"holds a run with usable records 28 \(\w+\) \(now 27 \(\w+\)\); resume"):
        run(task, begun, "--resume", "--image-folder", tmp_path / "moved")
    config = json.loads((task / "model" / "config.json").read_text())
    (tmp_path / "moved" / "model" / "config.json").write_text(json.dumps({**config, "image_seq_length": 1}))
    with pytest.raises(ValueError, match=r"--model sha256:\w+ \(now sha256:\w+\)"):
        run(task, begun, "--resume", "--model", tmp_path / "moved" / "model")


def test_another_place_or_number_at_once_is_the_same_run(task, begun, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(task, moved)
    run(moved, begun, "--resume", "--device-batch-size", "1", "--dataloader_num_workers", "1")
    assert (begun / "apt_new_layers.safetensors").is_file()


@pytest.mark.parametrize("left", ["all", "checkpoint-3", "apt_new_layers.safetensors", "finetune_run.json"])
def test_a_second_run_in_a_folder_is_refused_and_overwrites_only_when_asked(task, finished, tmp_path, left):
    output = tmp_path / "run"
    if left == "all":
        shutil.copytree(finished, output)
    else:
        output.mkdir()
        (shutil.copytree if left == "checkpoint-3" else shutil.copy)(finished / left, output / left)
    (output / "notes.txt").write_text("mine")
    before = {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("*")}
    for more in ([], ["--resume"]):
        with pytest.raises(ValueError, match="another --output-dir"):
            run(task, output, "--learning-rate", "0.1", *more)
    assert before == {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("*")}
    run(task, output, "--learning-rate", "0.1", "--max_steps", "2", "--overwrite")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / RUN_FILE).read_text())["--learning-rate"] == 0.1


def test_the_models_own_folder_is_never_overwritten(task, tmp_path):
    before = content_of(task / "model")
    with pytest.raises(ValueError, match="is the folder of --model"):
        run(task, task / "model", "--overwrite")
    with pytest.raises(ValueError, match="already holds"):
        run(task, task / "model", "--model", shutil.copytree(task / "model", tmp_path / "copy"))
    assert content_of(task / "model") == before


def test_a_damaged_run_file_is_refused(task, begun):
    for content in ("", "{", "[1]", "7"):
        (begun / RUN_FILE).write_text(content)
        with pytest.raises(ValueError, match=r"finetune_run\.json is damaged .*--overwrite"):
            run(task, begun, "--resume")


def test_a_finished_run_that_is_resumed_stays_as_it_is(task, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run(task, tmp_path / "run", "--resume", "--save_steps", "3", "--save_total_limit", "5")
    for path in finished.rglob("*.safetensors"):
        result = load_file(tmp_path / "run" / path.relative_to(finished))
        assert all(torch.equal(result[name], tensor) for name, tensor in load_file(path).items())


def test_lora_is_resumed_too(task, tmp_path):
    more = ["--train", "lora", "--save_steps", "1", "--save_total_limit", "5", "--max_steps", "3"]
    run(task, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "part" / "checkpoint-1")
    shutil.copy(tmp_path / "whole" / RUN_FILE, tmp_path / "part")
    run(task, tmp_path / "part", *more, "--resume")
    expected, result = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------------------------------- weights


@pytest.fixture
def checkpoint(tmp_path):
    return save_hub_checkpoint(tmp_path)


def test_pickled_weights_are_refused_unread_and_can_be_converted(checkpoint, tmp_path_factory):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save({**weights, "more": Touches(checkpoint / "executed")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"\.bin files, which may hold code; convert them: transformers\.Llava") as error:
        LlavaAptForConditionalGeneration.from_pretrained(checkpoint)
    one_line(error)
    with pytest.raises(OSError, match=r"\.bin files"):
        LlavaAptForConditionalGeneration.from_pretrained(checkpoint, use_safetensors=False)
    assert not (checkpoint / "executed").exists()

    torch.save(weights, checkpoint / "pytorch_model.bin")
    converted = tmp_path_factory.mktemp("converted")
    type(stock_model()).from_pretrained(checkpoint).save_pretrained(converted)  # as the message says
    loaded = LlavaAptForConditionalGeneration.from_pretrained(converted).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stock_model().state_dict().items())


def test_pickled_weights_beside_others_are_not_read(checkpoint):
    torch.save(Touches(checkpoint / "executed"), checkpoint / "pytorch_model.bin")
    LlavaAptForConditionalGeneration.from_pretrained(checkpoint, use_safetensors=False)
    assert not (checkpoint / "executed").exists()


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_damaged_weights_are_refused_in_one_line(checkpoint, length):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="has a damaged safetensors file") as error:
        LlavaAptForConditionalGeneration.from_pretrained(checkpoint)
    one_line(error)


def test_damaged_new_layers_are_refused_in_one_line(checkpoint, tmp_path):
    model = LlavaAptForConditionalGeneration.from_pretrained(checkpoint, thresholds={28: 2})
    path = save_new_layers(model, tmp_path)
    whole, tensors = path.read_bytes(), load_file(path)
    contents = [b"", whole[:7], whole[:-1], pickle.dumps(Touches(tmp_path / "executed"))]
    for options in ("{", "[]", '{"thresholds": 5}', '{"thresholds": {"x": 1}}'):
        save_file(tensors, path, metadata={"apt": options})
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"apt_new_layers\.safetensors is damaged or no file of new") as error:
            load_new_layers(model, path)
        one_line(error)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    "more, message",
    [
        (["--save_steps", "1"], "adaptive_embed.* is not finite after step 1"),
        (["--save_steps", "1", "--logging_steps", "100"], "adaptive_embed.* is not finite after step 1"),
        (["--save_steps", "100", "--logging_steps", "100"], "the loss is nan after step 1"),
        (["--save_strategy", "no", "--max_steps", "1"], "adaptive_embed.* is not finite after step 1"),
    ],
)
def test_a_run_that_diverges_ends_with_an_error_and_saves_nothing_that_is_not_finite(task, tmp_path, more, message):
    """In the last case the loss is finite to the end: the only step's weights are not."""
    with pytest.raises(FloatingPointError, match=rf"{message}; use a smaller --learning-rate"):
        run(task, tmp_path, "--learning-rate", "1e39", "--warmup_steps", "0", *more)
    assert not (tmp_path / "apt_new_layers.safetensors").exists()
    for path in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
