"""Adaptive Patch Transformers (arXiv 2510.18091) for dense prediction and vision-language models.

Reading order: scores, selection, layout, embed, attention, rotary, block, trunk, then ``backbones``, one file per
network. ``apt_backbones.mm`` registers the parts with the
OpenMMLab toolboxes; nothing here needs them.
"""

from importlib import import_module

from . import versions  # noqa: F401
from .attention import varlen_attention
from .embed import AdaptivePatchEmbed
from .freeze import freeze_host
from .layout import PatchLayout, Segments
from .rotary import apply_rotary, rotary_table
from .scores import score_patches, select_patches
from .selection import drop_at_random, drop_padding

# These modules import timm, which takes seconds; whoever needs only the rest does not wait for it.
_NEEDS_TIMM = {
    "APTEva02": "backbones.eva02",
    "AdaptiveTrunk": "trunk",
    "adapt": "backbones.timm_vit",
    "find_trunk": "trunk",
    "convert_eva02": "checkpoint",
    "load_converted": "checkpoint",
    "read_checkpoint": "checkpoint",
}

__all__ = [
    "APTEva02",
    "AdaptivePatchEmbed",
    "AdaptiveTrunk",
    "PatchLayout",
    "Segments",
    "adapt",
    "apply_rotary",
    "convert_eva02",
    "drop_at_random",
    "drop_padding",
    "find_trunk",
    "freeze_host",
    "load_converted",
    "read_checkpoint",
    "rotary_table",
    "score_patches",
    "select_patches",
    "varlen_attention",
]


def __getattr__(name: str):
    if name in _NEEDS_TIMM:
        return getattr(import_module(f".{_NEEDS_TIMM[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
