"""Adaptive patches, short fine-tuned from the dense detector: 5 % of its iterations, a tenth of its learning rate."""

_base_ = "eva02_tiny_dense_photoshapes.py"
max_iters = 60
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=5),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=5, end=max_iters, T_max=max_iters - 5),
]
model = dict(type="ShortFinetuneCascadeRCNN", backbone=_base_.adaptive)
load_from = "work_dirs/det/eva02_tiny_dense_photoshapes/iter_1200.pth"
