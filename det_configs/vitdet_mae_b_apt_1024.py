"""MAE's ViT-B at 1024 pixels with adaptive patches, short fine-tuned from the dense detector."""

_base_ = ["_base_/vitdet_b_16_1024.py", "_base_/coco_1024.py", "_base_/short_finetune_3k.py"]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=dict(model="vit_base_patch16_224.mae", **_base_.adaptive))
load_from = "work_dirs/det/vitdet_mae_b_dense_1024/iter_60000.pth"
