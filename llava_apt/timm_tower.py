"""The vision tower of a LLaVA checkpoint as a timm ViT, for everything that the tools do with timm's networks."""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from apt_backbones.checkpoint import load_converted

from .configuration import LlavaAptConfig

_INDEX, _FILE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {  # transformers' of a layer -> timm's
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def timm_tower(folder: Path) -> VisionTransformer:
    """The tower, with its weights and without its last norm, up to the layer whose features the language model gets.

    Args:
        folder: of a LLaVA-1.5 in transformers' layout, with safetensors files.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: LLaVA uses features of several layers; or the weights do not fit the configuration.
    """
    config = LlavaAptConfig.from_pretrained(folder)
    vision, layer = config.vision_config, config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{folder} uses features of layers {layer}; only those of a single layer can be matched")
    depth = layer % (vision.num_hidden_layers + 1)  # of the hidden states, the first is what enters the first layer
    vit = VisionTransformer(
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        embed_dim=vision.hidden_size,
        depth=depth,
        num_heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        act_layer=vision.hidden_act,
        norm_layer=partial(nn.LayerNorm, eps=vision.layer_norm_eps),
        pre_norm=True,
        final_norm=False,
        num_classes=0,
        dynamic_img_size=True,
    )
    vit.pretrained_cfg = {"mean": vision.image_mean, "std": vision.image_std}
    load_converted(vit, _timm_names(_tower_weights(Path(folder)), depth))
    return vit.eval()


def _tower_weights(folder: Path) -> dict[str, Tensor]:
    """The tower's weights by the names that they have in it, of all files of a checkpoint."""
    files = {_FILE}
    if (folder / _INDEX).is_file():
        files = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
    weights = {}
    for file in sorted(files):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} does not exist; give the folder of a LLaVA with its weights")
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                _, mark, own = name.partition("vision_tower.")
                if mark:
                    weights[own.removeprefix("vision_model.")] = opened.get_tensor(name).float()
    return weights


def _timm_names(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    found = {
        "cls_token": weights["embeddings.class_embedding"][None, None],
        "pos_embed": weights["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": weights["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"norm_pre.{kind}"] = weights[f"pre_layrnorm.{kind}"]
        for block in range(depth):
            of_layer = f"encoder.layers.{block}."
            parts = [weights[f"{of_layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            for theirs, ours in _NAMES.items():
                found[f"blocks.{block}.{ours}.{kind}"] = weights[f"{of_layer}{theirs}.{kind}"]
    return found
