"""DINOv3 ViT-B at 1024 pixels with adaptive patches, short fine-tuned from the dense detector."""

_base_ = ["_base_/vitdet_b_16_1024.py", "_base_/coco_1024.py", "_base_/short_finetune_3k.py"]
model = dict(
    type="ShortFinetuneCascadeRCNN", backbone=dict(model="vit_base_patch16_dinov3.lvd1689m", **_base_.adaptive)
)
load_from = "work_dirs/det/dinov3_b_dense_1024/iter_60000.pth"
