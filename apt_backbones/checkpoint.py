"""Checkpoints: safe reading, conversion of the original EVA-02 names to ours, and loading without silent gaps."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from .freeze import is_new

# Names that training code wraps weights in, in the order in which they are looked for.
_WRAPPERS = ("model_ema", "model", "module", "state_dict")

# Original name -> our name, first match wins; None drops the entry (buffers that we compute). A name that matches
# no rule is an error. "trunk." marks what timm's own filter then renames.
_RULES = {
    "det": [
        (r"backbone\.net\.(.*\.)?rope(_win|_glb)?\.freqs_(cos|sin)", None),
        (r"backbone\.net\.(.+)", r"trunk.\1"),
    ],
    "seg": [
        (r"backbone\.(.*\.)?rope\.freqs_(cos|sin)", None),
        (r"backbone\.((cls_token|pos_embed|patch_embed|blocks).*)", r"trunk.\1"),
    ],
}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Weights of a .safetensors or PyTorch file, on the CPU, without executing anything that the file holds.

    Returns:
        name -> tensor; ``{"model": ...}``, ``{"state_dict": ...}`` and the like are unwrapped, and entries that are
        no tensors are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is damaged, holds no weights, or needs code to be executed to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read safely as weights ({reason}); "
            "save its state_dict with torch.save or safetensors and use that file"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not weights:
        raise ValueError(f"{path} holds no weights")
    return weights


def convert_eva02(state_dict: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Rename the original EVA-02 weights to those of our mm models; pure renaming, no model needed.

    Args:
        state_dict: weights under the names of the original detection or segmentation code, or any part of them.
        kind: "det" or "seg".

    Raises:
        ValueError: the kind is unknown, or names are not of that kind of checkpoint (they are listed).
    """
    if kind not in _RULES:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(_RULES)}")
    converted, trunk, unknown = {}, {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in _RULES[kind]:
            if match := re.fullmatch(pattern, name):
                if replacement is not None:
                    renamed = match.expand(replacement)
                    target = trunk if renamed.startswith("trunk.") else converted
                    target[renamed.removeprefix("trunk.")] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not an EVA-02 {kind} checkpoint: {_listed(unknown)} unknown")
    if kind == "det" and "pos_embed" in trunk:
        trunk["pos_embed"] = trunk["pos_embed"][:, 1:]  # the detection trunk has no CLS token
    converted.update({f"backbone.{name}": tensor for name, tensor in _timm_names(trunk).items()})
    return converted


def load_converted(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights strictly, except that ConvDown and ZeroMLP may be missing (then they keep their initial values).

    Raises:
        ValueError: names are missing or unknown, or shapes differ; the message lists them.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state_dict and not is_new(name)]
    unknown = [name for name in state_dict if name not in own]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in state_dict.items()
        if name in own and tensor.shape != own[name].shape
    ]
    complaints = [
        f"{_listed(names)} {what}"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (misshapen, "of another shape"))
        if names
    ]
    if complaints:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(complaints)}")
    model.load_state_dict(state_dict, strict=False)


def _timm_names(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's filter also resamples positions and patches to a model; given none, it only renames."""
    if not trunk:
        return {}
    patches = trunk.get("patch_embed.proj.weight", torch.empty(0, 0, 0, 0))
    no_model = SimpleNamespace(patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=patches)), pos_embed=None)
    # It looks at this name to tell separate from fused projections; a part of a checkpoint may lack it.
    marker = "blocks.0.attn.q_proj.weight"
    renamed = checkpoint_filter_fn({marker: None, **trunk}, no_model)
    return {name: tensor for name, tensor in renamed.items() if tensor is not None}


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{len(names)} entries ({shown}{', ...' if len(names) > most else ''})"
