"""Short fine-tuning: freeze a whole model but the layers that APT adds (APT, arXiv 2510.18091, section 3.4)."""

from functools import partial

from torch import nn

NEW_LAYERS = ("conv_down", "zero_mlp", "map_detail", "token_adapters")


def is_new(name: str) -> bool:
    """Whether a parameter's or module's dotted name belongs to ConvDown, ZeroMLP, MapDetail or TokenAdapter."""
    return any(part in NEW_LAYERS for part in name.split("."))


def freeze_host(model: nn.Module) -> nn.Module:
    """Make only the new layers trainable, and keep all the rest in eval mode from now on.

    ``model.train()`` then leaves drop path, dropout and batch norm statistics of the host as they are at test time.
    The instance is changed in place and returned.

    Raises:
        ValueError: the model has no new layers to train.
    """
    new_layers = [name for name, _ in model.named_parameters() if is_new(name)]
    if not new_layers:
        raise ValueError(
            "nothing to train: the model has none of the new layers; "
            'give its backbone thresholds and merge="apt" (or adapter_rank=16, or map_fill="learned")'
        )
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """As ``freeze_host``, for a model that need not have new layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))
    model.train = partial(_train_new_layers, model)  # unlike a closure, copies and pickles follow the model
    return model.train(model.training)


def _train_new_layers(model: nn.Module, mode: bool = True) -> nn.Module:
    type(model).train(model, False)
    model.training = mode
    for name, module in model.named_modules():
        if is_new(name):
            module.training = mode
    return model
