"""Learned scorer and interpolated maps, and heads that learn to read them: a short fine-tune of the dense detector,
whose trunk stays frozen."""

_base_ = ["_base_/eva02_tiny.py", "_base_/photoshapes.py", "_base_/short_finetune_photoshapes.py"]
model = dict(backbone=dict(**_base_.learned, frozen=True))
load_from = "work_dirs/det/eva02_tiny_dense_photoshapes/iter_1200.pth"
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
