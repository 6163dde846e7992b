"""The EVA-02 trunk as a backbone that mmdet and mmseg configs can name."""

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from .. import eva02
from ..checkpoint import load_pretrained, read_checkpoint


@MODELS.register_module()
class APTEva02(eva02.APTEva02, BaseModule):
    """``apt_backbones.APTEva02`` with mmengine's ``init_cfg``; all other arguments are the same.

    ``init_cfg=dict(type="Pretrained", checkpoint=FILE)`` starts training from what ``load_pretrained`` takes, read
    safely and loaded strictly.
    """

    def __init__(self, *args, init_cfg: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if init_cfg is not None and init_cfg["type"] != "Pretrained":
            raise ValueError(f"init_cfg of the backbone must be of type Pretrained, not {init_cfg['type']}")
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        if self.init_cfg is not None and not self.is_init:
            load_pretrained(self, read_checkpoint(self.init_cfg["checkpoint"]))
        self.is_init = True
