"""DINOv2 ViT-S at 1024 pixels with adaptive patches, short fine-tuned from the dense detector."""

_base_ = ["_base_/vitdet_b_14_1024.py", "_base_/coco_1024.py", "_base_/short_finetune_3k.py"]
model = dict(
    type="ShortFinetuneCascadeRCNN",
    backbone=dict(model="vit_small_patch14_dinov2.lvd142m", **_base_.adaptive_14),
    neck=dict(in_channels=384),
)
load_from = "work_dirs/det/dinov2_s_dense_1024/iter_60000.pth"
