"""Adaptive patches of 16 to 128 pixels, short fine-tuned from the converted dense detector."""

_base_ = ["_base_/eva02_b_1536.py", "_base_/coco_1536.py", "_base_/short_finetune_3k.py", "_base_/runtime.py"]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3}))
load_from = "checkpoints/eva02_b_det_1536.safetensors"
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
