"""Checkpoints: safe reading, conversion of the original EVA-02 names to ours, and loading without silent gaps."""

import math
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from .freeze import is_new

# Names that training code wraps weights in, in the order in which they are looked for.
_WRAPPERS = ("model_ema", "model", "module", "state_dict")

# What pretrained trunks hold beside the network that detection and segmentation start from.
_PRETRAINING_ONLY = r"(mask_token|lm_head|norm|fc_norm|head|rope)\b"

_DTYPES = ("int32", "int64", "uint32", "float32", "float64")  # of numpy arrays and scalars in training checkpoints

# Original name -> our name (or a function of the match), first match wins; None drops the entry (buffers that we
# compute). A name that matches no rule is an error. "trunk." marks what timm's own filter then renames.
_RULES = {
    "det": [
        (r"backbone\.net\.(.*\.)?rope(_win|_glb)?\.freqs_(cos|sin)", None),
        (r"backbone\.net\.(.+)", r"trunk.\1"),
        # Convolutions with a norm; the index counts the layers of a pyramid level.
        (r"backbone\.simfp_(2\.[45]|[35]\.[12]|4\.[01])\.(weight|bias)", r"neck.p\1.conv.\2"),
        (r"backbone\.simfp_(\d\.\d)\.norm\.(\w+)", r"neck.p\1.ln.\2"),
        (r"backbone\.simfp_(\d\.\d\.\w+)", r"neck.p\1"),
        (r"proposal_generator\.anchor_generator\..+|pixel_(mean|std)", None),
        (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.(\w+)", r"rpn_head.rpn_conv.\1.conv.\2"),
        (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn_head.rpn_cls.\1"),
        (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn_head.rpn_reg.\1"),
        # The heads' convolutions, which the original counts from 1 and mmdet from 0.
        (
            r"roi_heads\.box_head\.(\d)\.conv([1-4])\.(norm\.)?(weight|bias)",
            lambda m: f"roi_head.bbox_head.{m[1]}.shared_convs.{int(m[2]) - 1}.{'ln' if m[3] else 'conv'}.{m[4]}",
        ),
        (
            r"roi_heads\.mask_head\.mask_fcn([1-4])\.(norm\.)?(weight|bias)",
            lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}.{'ln' if m[2] else 'conv'}.{m[3]}",
        ),
        (r"roi_heads\.box_head\.(\d)\.fc1\.(\w+)", r"roi_head.bbox_head.\1.shared_fcs.0.\2"),
        (r"roi_heads\.box_predictor\.(\d)\.cls_score\.(\w+)", r"roi_head.bbox_head.\1.fc_cls.\2"),
        (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.(\w+)", r"roi_head.bbox_head.\1.fc_reg.\2"),
        (r"roi_heads\.mask_head\.deconv\.(\w+)", r"roi_head.mask_head.upsample.\1"),
        (r"roi_heads\.mask_head\.predictor\.(\w+)", r"roi_head.mask_head.conv_logits.\1"),
    ],
    "seg": [
        (r"backbone\.(.*\.)?rope\.freqs_(cos|sin)", None),
        (r"backbone\.((cls_token|pos_embed|patch_embed|blocks)\b.*)", r"trunk.\1"),
        # The multi-scale maps, which are mmseg's Feature2Pyramid.
        (r"backbone\.fpn1\.(.+)", r"neck.upsample_4x.\1"),
        (r"backbone\.fpn2\.(.+)", r"neck.upsample_2x.\1"),
        (r"(decode_head|auxiliary_head)\.(.+)", r"\1.\2"),
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
    return weights_of(read_file(path, mmap=True), path)


def read_file(path: str | Path, mmap: bool = False) -> object:
    """All that a .safetensors or PyTorch file holds: tensors, plain Python values, and mmengine's log history.

    Args:
        path: the file.
        mmap: leave tensors on the disk until they are used; the file must then stay as it is.

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(
            f"{path} cannot be read safely as weights ({_reason(error)}); "
            "save its state_dict with torch.save or safetensors and use that file"
        ) from error


def weights_of(content: object, path: str | Path) -> dict[str, Tensor]:
    """The weights in a file's content, as ``read_checkpoint`` gives them."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not weights:
        raise ValueError(f"{path} holds no weights")
    return weights


def _reason(error: Exception) -> str:
    """What is wrong with a file, without torch's advice to execute it nevertheless."""
    if match := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error)):
        return f"it would execute {match[1]}"
    match = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return match[1] if match else (str(error) or type(error).__name__).splitlines()[0]


def _harmless_globals() -> list[tuple[object, str]]:
    """What mmengine's training checkpoints hold beside tensors and plain values: numpy arrays of logged scalars."""
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        return []

    def statistic(owner: object, name: str) -> object:
        """Stands in for ``getattr``, by which a log history names its statistics."""
        if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
            raise pickle.UnpicklingError(f"it would read the attribute {name!r} of {owner!r}")
        return getattr(owner, name)

    HistoryBuffer()._set_default_statistics()
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    harmless = [
        (HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
        (statistic, "builtins.getattr"),
        (np.ndarray, "numpy.ndarray"),
        (np.dtype, "numpy.dtype"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        harmless += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    # Unpickling gives a dtype its class, which torch asks for by itself.
    return harmless + [(type(np.dtype(name)), f"numpy.dtypes.{type(np.dtype(name)).__name__}") for name in _DTYPES]


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
                    renamed = replacement(match) if callable(replacement) else match.expand(replacement)
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


def load_converted(model: nn.Module, state_dict: Mapping[str, Tensor], name: object = "the checkpoint") -> None:
    """Load weights strictly, except that ConvDown and ZeroMLP may be missing (then they keep their initial values).

    A model that can take more than its own weights, such as those of another crop size, changes them first in its
    ``adapt_state_dict``.

    Args:
        name: of the weights' file, for the message.

    Raises:
        ValueError: names are missing or unknown, or shapes differ; the message lists them.
    """
    own, state_dict = model.state_dict(), dict(state_dict)
    if hasattr(model, "adapt_state_dict"):
        model.adapt_state_dict(state_dict)
    missing = [key for key in own if key not in state_dict and not is_new(key)]
    unknown = [key for key in state_dict if key not in own]
    misshapen = [
        f"{key} {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        for key, tensor in state_dict.items()
        if key in own and tensor.shape != own[key].shape
    ]
    complaints = [
        f"{_listed(keys)} {what}"
        for keys, what in ((missing, "missing"), (unknown, "unknown"), (misshapen, "of another shape"))
        if keys
    ]
    if complaints:
        raise ValueError(f"{name} is of another model: {'; '.join(complaints)}")
    model.load_state_dict(state_dict, strict=False)


def load_pretrained(trunk: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Start a trunk from EVA-02's masked-image pretraining, as the original fine-tuning does.

    Args:
        trunk: an ``APTEva02``.
        state_dict: BAAI's ``eva02_*_pt_*`` files, timm's weights of the same networks (patch embedding and positions
            are resampled to the trunk's), or a whole model of ours, of which the backbone is taken.

    Raises:
        ValueError: names are missing or unknown, or shapes differ; the message lists them.
    """
    of_backbone = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    weights = _timm_names(of_backbone or state_dict, trunk.patch_embed.proj.weight)
    weights = {k: v for k, v in weights.items() if not re.match(_PRETRAINING_ONLY, k)}
    if "pos_embed" in weights:
        positions = weights["pos_embed"]
        has_cls_token = math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
        positions = resample_abs_pos_embed(
            positions, trunk.position_grid, num_prefix_tokens=int(has_cls_token), antialias=trunk.antialias_positions
        )
        if has_cls_token and not trunk.num_prefix:
            positions = positions[:, 1:]
        weights["pos_embed"] = positions
    if not trunk.num_prefix:
        weights.pop("cls_token", None)
    load_converted(trunk, weights)


def _timm_names(trunk: Mapping[str, Tensor], patches: Tensor | None = None) -> dict[str, Tensor]:
    """timm's names for the weights of a trunk, which may be incomplete; patches of another size than ``patches`` are
    resampled to it."""
    if not trunk:
        return {}
    if patches is None:
        patches = trunk.get("patch_embed.proj.weight", torch.empty(0, 0, 0, 0))
    model = SimpleNamespace(patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=patches)), pos_embed=None)
    # The filter looks at this name to tell separate from fused projections.
    marker = "blocks.0.attn.q_proj.weight"
    renamed = checkpoint_filter_fn({marker: None, **trunk}, model)
    return {name: tensor for name, tensor in renamed.items() if tensor is not None}


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{len(names)} entries ({shown}{', ...' if len(names) > most else ''})"
