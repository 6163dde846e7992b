"""Damaged and hostile files, and runs that are not the one in the folder: refused in one line, and never executed."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_apt import LlavaAptForConditionalGeneration, load_new_layers, save_new_layers

from .llava_tiny import save_hub_checkpoint, stock_model


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------- weights


@pytest.fixture
def checkpoint(tmp_path):
    save_hub_checkpoint(tmp_path)
    return tmp_path


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
