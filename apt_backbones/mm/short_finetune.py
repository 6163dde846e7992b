"""Models of the toolboxes in which only ConvDown and ZeroMLP train (APT, arXiv 2510.18091, section 3.4)."""

from ..freeze import freeze_host


class ShortFinetune:
    """Mixin: freeze everything but the new layers at construction.

    That is before the model is wrapped for distributed training and before the optimizer is built, so both see only
    what trains. Put it in front of the host: ``class ShortFinetuneCascadeRCNN(ShortFinetune, CascadeRCNN)``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        freeze_host(self)
