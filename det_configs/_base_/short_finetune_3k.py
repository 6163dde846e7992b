"""APT's short fine-tune (arXiv 2510.18091): 5 % of the recipe's iterations at a tenth of its learning rate."""

_base_ = "schedule_60k.py"
max_iters = 3000
train_cfg = dict(max_iters=max_iters, val_interval=1000)
optim_wrapper = dict(optimizer=dict(lr=5e-6))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=False, milestones=[max_iters * 8 // 10, max_iters * 9 // 10], gamma=0.1),
]
