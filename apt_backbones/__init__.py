"""Adaptive Patch Transformers (arXiv 2510.18091) for dense prediction and vision-language models.

Reading order: scores, layout, embed, attention, rotary, eva02. ``apt_backbones.mm`` registers the parts with the
OpenMMLab toolboxes; nothing here needs them.
"""

from .attention import varlen_attention
from .checkpoint import convert_eva02, load_converted, read_checkpoint
from .embed import AdaptivePatchEmbed, drop_at_random
from .eva02 import APTEva02
from .freeze import freeze_host
from .layout import PatchLayout, Segments
from .rotary import apply_rotary, rotary_tables
from .scores import score_patches, select_patches

__all__ = [
    "APTEva02",
    "AdaptivePatchEmbed",
    "PatchLayout",
    "Segments",
    "apply_rotary",
    "convert_eva02",
    "drop_at_random",
    "freeze_host",
    "load_converted",
    "read_checkpoint",
    "rotary_tables",
    "score_patches",
    "select_patches",
    "varlen_attention",
]
