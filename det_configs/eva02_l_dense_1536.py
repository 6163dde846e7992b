"""EVA-02-L at 1536 pixels, dense: the published detector, trained from BAAI's masked-image pretraining."""

_base_ = ["_base_/eva02_l_1536.py", "_base_/coco_1536.py", "_base_/schedule_60k.py"]
pretrained = dict(type="Pretrained", checkpoint="checkpoints/eva02_L_pt_m38m_p14to16.pt")
model = dict(backbone=dict(init_cfg=pretrained))
