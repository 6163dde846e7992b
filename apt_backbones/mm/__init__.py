"""What the OpenMMLab toolboxes see, in mmengine's root registry; ``det`` and ``seg`` add what needs theirs."""

from .backbone import APTEva02

__all__ = ["APTEva02"]
