"""Adaptive patches of 16 to 128 pixels, short fine-tuned from the converted dense detector."""

_base_ = ["_base_/eva02_l_1536.py", "_base_/coco_1536.py", "_base_/short_finetune_3k.py"]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=_base_.adaptive)
load_from = "checkpoints/eva02_l_det_1536.safetensors"
