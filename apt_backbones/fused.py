"""Frozen linear layers on the same input as one matrix product, without a second copy of their weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class FusedLinears:
    """One weight and one bias over the rows of several frozen ``nn.Linear`` layers.

    The layers stay what they are, under their own names; their parameters become views of the fused memory. So whatever
    writes into them (loading weights, an average of weights) is seen here at once. Whatever gives them other memory
    (``.to()``, ``deepcopy``, assignment) shows in their addresses, and they are fused anew at the next use.
    """

    def __init__(self):
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._layers: Sequence[nn.Linear] = ()

    def __reduce__(self):
        return FusedLinears, ()  # copies and pickles hold the layers' parameters, and fuse those at their first use

    def fuse(self, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor] | None:
        """Joint weight (sum of outputs, inputs) and bias (sum of outputs,), zero where a layer has none.

        Returns:
            None if the layers must run one by one: because one of them trains (its optimizer or a sharding wrapper
            may keep hold of its memory), is not a plain ``nn.Linear`` (an adapter or a quantized layer), is sharded, or
            has hooks.
        """
        if any(type(layer) is not nn.Linear or _trains(layer) or is_hooked(layer) for layer in layers):
            return None
        return (self._weight, self._bias) if self._is_current(layers) else self._fuse(layers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def release(self) -> None:
        """Give the layers memory of their own until they are next fused. (Savers such as safetensors and accelerate
        drop or refuse tensors that share memory.)"""
        for layer in self._layers if self._weight is not None and self._is_current(self._layers) else ():
            layer.weight.data = layer.weight.detach().clone()
            if layer.bias is not None:
                layer.bias.data = layer.bias.detach().clone()
        self._weight, self._bias, self._layers = None, None, ()

    def _is_current(self, layers: Sequence[nn.Linear]) -> bool:
        if self._weight is None or self._weight.dtype != layers[0].weight.dtype:
            return False
        address, bias_address = self._weight.data_ptr(), self._bias.data_ptr()
        for layer in layers:
            if layer.weight.data_ptr() != address:
                return False
            if layer.bias is not None and layer.bias.data_ptr() != bias_address:
                return False
            address += layer.weight.nbytes
            bias_address += layer.out_features * self._bias.element_size()
        return True

    # Weights that are made in inference mode could not take part in training later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _fuse(self, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
        sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = weight.new_zeros(sum(sizes))
        for layer, own_weight, own_bias in zip(layers, weight.split(sizes), bias.split(sizes)):
            layer.weight.data = own_weight
            if layer.bias is not None:
                own_bias.copy_(layer.bias)
                layer.bias.data = own_bias
        # They have the model's shapes, not the batch's: a compiled block may rely on them.
        for fused in (weight, bias):
            torch._dynamo.mark_static(fused)
        self._weight, self._bias, self._layers = weight, bias, layers  # last: other threads may ask meanwhile
        return weight, bias


def _trains(layer: nn.Linear) -> bool:
    return layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module's call does more than its ``forward``, or ``fully_shard`` (FSDP) has hooks on its weights."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


class Hooked(nn.Module):
    """Stands for a module whose call runs a function, with the module's own hooks around it."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.__dict__.update(module.__dict__)
        self.forward = function
