"""Layer-wise learning rate decay for timm-style ``blocks.N`` (BEiT, arXiv 2106.08254; ViTDet, arXiv 2203.16527)."""

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..trunk import named_trunk

_NO_DECAY = ("pos_embed", "cls_token", "reg_token")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Block N of L learns with lr * decay_rate ** (L - N), patches and positions with lr * decay_rate ** (L + 1).

    All else (neck, heads, ConvDown, ZeroMLP) learns with lr. Parameters that do not require gradients are left out.
    ``paramwise_cfg`` holds:

    - ``decay_rate``: 1 for no layer decay.
    - ``decay_all``: decay every weight (EVA-02's detection recipe) instead of leaving out vectors, biases, positions
      and prefix tokens (its segmentation recipe).
    """

    def _validate_cfg(self) -> None:
        if set(self.paramwise_cfg) != {"decay_rate", "decay_all"}:
            raise ValueError(f"paramwise_cfg must hold decay_rate and decay_all, not {sorted(self.paramwise_cfg)}")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        trunk_name, trunk = named_trunk(module)
        num_layers = len(trunk.blocks)
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of(name, trunk_name, num_layers)
            is_vector = parameter.ndim == 1 or name.endswith(_NO_DECAY)
            decays = self.paramwise_cfg["decay_all"] or not is_vector
            group = groups.setdefault((layer, decays), {"params": [], "param_names": []})
            group["params"].append(parameter)
            group["param_names"].append(name)
        # The last layers first: the logged learning rate is that of the first group.
        for layer, decays in sorted(groups, reverse=True):
            group = groups[layer, decays]
            group["lr"] = self.base_lr * self.paramwise_cfg["decay_rate"] ** (num_layers + 1 - layer)
            group["weight_decay"] = (self.base_wd or 0.0) if decays else 0.0
            params.append(group)


def layer_of(name: str, trunk_name: str, num_layers: int) -> int:
    """0 for patches and positions of the trunk, N + 1 for its block N, num_layers + 1 for all else."""
    if not name.startswith(f"{trunk_name}."):
        return num_layers + 1
    part, *rest = name.removeprefix(f"{trunk_name}.").split(".")
    if part in ("patch_embed", *_NO_DECAY):
        return 0
    return int(rest[0]) + 1 if part == "blocks" else num_layers + 1
