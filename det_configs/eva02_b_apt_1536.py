"""Adaptive patches of 16 to 128 pixels, short fine-tuned from the converted dense detector."""

_base_ = ["_base_/eva02_b_1536.py", "_base_/coco_1536.py", "_base_/short_finetune_3k.py"]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=_base_.adaptive)
load_from = "checkpoints/eva02_b_det_1536.safetensors"
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
