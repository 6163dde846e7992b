"""Learned scorer and interpolated maps, and heads that learn to read them: a short fine-tune of the dense detector,
whose trunk stays frozen."""

_base_ = ["_base_/eva02_b_1536.py", "_base_/coco_1536.py", "_base_/short_finetune_3k.py"]
model = dict(backbone=dict(**_base_.learned, frozen=True))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
load_from = "checkpoints/eva02_b_det_1536.safetensors"
