"""Adaptive patches on PhotoShapes: 5 % of the dense model's iterations at a tenth of its learning rate."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(type="ShortFinetuneEncoderDecoder", backbone=_base_.adaptive)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=5),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=5, end=120),
]
train_cfg = dict(max_iters=120, val_interval=120)
load_from = "work_dirs/seg/eva02_tiny_dense_photoshapes/iter_2400.pth"
