"""The EVA-02 trunk as a backbone that mmdet and mmseg configs can name."""

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from .. import eva02


@MODELS.register_module()
class APTEva02(eva02.APTEva02, BaseModule):
    """``apt_backbones.APTEva02`` with mmengine's ``init_cfg``; all other arguments are the same."""

    def __init__(self, *args, init_cfg: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_cfg = init_cfg
