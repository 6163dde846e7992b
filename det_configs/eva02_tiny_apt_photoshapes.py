"""Adaptive patches, short fine-tuned from the dense detector."""

_base_ = ["_base_/eva02_tiny.py", "_base_/photoshapes.py", "_base_/short_finetune_photoshapes.py"]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=_base_.adaptive)
load_from = "work_dirs/det/eva02_tiny_dense_photoshapes/iter_1200.pth"
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
