"""Short fine-tuning (APT, arXiv 2510.18091, section 3.4): 5 % of the iterations at a tenth of the learning rate."""

_base_ = "schedule_80k.py"
optim_wrapper = dict(optimizer=dict(lr=4e-6))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=75),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=75, end=4000),
]
train_cfg = dict(max_iters=4000, val_interval=1000)
