"""What the OpenMMLab toolboxes see, in mmengine's root registry; ``det`` and ``seg`` add what needs theirs."""

from .backbone import APTEva02, APTTimm
from .hooks import TokenCountHook
from .optimizer import LayerDecayOptimWrapperConstructor
from .runner import APTRunner
from .short_finetune import ShortFinetune

__all__ = [
    "APTEva02",
    "APTRunner",
    "APTTimm",
    "LayerDecayOptimWrapperConstructor",
    "ShortFinetune",
    "TokenCountHook",
]
