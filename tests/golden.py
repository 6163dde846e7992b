"""Tensors computed by the original networks (random weights, float32, CPU), kept in tests/data."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


class Golden(NamedTuple):
    weights: dict[str, Tensor]  # under the original names
    arrays: dict[str, Tensor]  # inputs and outputs
    config: dict


def load_golden(name: str) -> Golden:
    """The contents of tests/data/NAME.npz."""
    weights, arrays, config = {}, {}, {}
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        for key in file:
            if key == "config":
                config = json.loads(str(file[key]))
            elif key.startswith("weights/"):
                weights[key.removeprefix("weights/")] = torch.from_numpy(file[key])
            else:
                arrays[key] = torch.from_numpy(file[key])
    return Golden(weights, arrays, config)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    return float((value - reference).abs().max() / reference.abs().max())
