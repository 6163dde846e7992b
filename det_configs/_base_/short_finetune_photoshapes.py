"""A short fine-tune: 5 % of the iterations at a tenth of the learning rate."""

_base_ = "schedule_photoshapes.py"
max_iters = 60
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=5),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=5, end=max_iters, T_max=max_iters - 5),
]
