"""EVA-02-B at 1536 pixels, dense: the published detector, trained from BAAI's masked-image pretraining."""

_base_ = ["_base_/eva02_b_1536.py", "_base_/coco_1536.py", "_base_/schedule_60k.py"]
pretrained = dict(type="Pretrained", checkpoint="checkpoints/eva02_B_pt_in21k_p14to16.pt")
model = dict(backbone=dict(init_cfg=pretrained))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
