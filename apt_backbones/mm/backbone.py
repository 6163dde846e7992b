"""The EVA-02 trunk as a backbone that mmdet and mmseg configs can name."""

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from .. import eva02
from ..checkpoint import load_pretrained, read_checkpoint


@MODELS.register_module()
class APTEva02(eva02.APTEva02, BaseModule):
    """``apt_backbones.APTEva02`` with mmengine's ``init_cfg``; all other arguments are the same.

    ``init_cfg=dict(type="Pretrained", checkpoint=FILE)`` starts training from what ``load_pretrained`` takes, read
    safely and loaded strictly. Other types are mmengine's own initialisers.

    ``test_dtype="float16"`` or ``"bfloat16"`` computes the trunk in that precision on a GPU when no gradients are
    needed, and returns float32 maps. (Under autocast of a whole test, mmdet places anchors in half precision, which
    is too coarse for large images.)
    """

    def __init__(self, *args, init_cfg: dict | None = None, test_dtype: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_dtype = None if test_dtype is None else getattr(torch, test_dtype)
        self.init_cfg = init_cfg

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.test_dtype is None or not images.is_cuda or torch.is_grad_enabled():
            return super().forward(images)
        with torch.autocast("cuda", self.test_dtype):
            return tuple(x.float() for x in super().forward(images))

    def init_weights(self) -> None:
        if self.init_cfg is None or self.init_cfg["type"] != "Pretrained":
            super().init_weights()
        elif not self.is_init:
            load_pretrained(self, read_checkpoint(self.init_cfg["checkpoint"]))
            self.is_init = True
