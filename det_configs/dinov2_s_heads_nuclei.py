"""Heads that learn to read merged patches: a short fine-tune of the dense detector, 12 minutes of one CPU core."""

_base_ = "dinov2_s_learned_nuclei.py"
max_iters = 160
warmup, decay = _base_.param_scheduler
param_scheduler = [warmup, {**decay, "end": max_iters, "T_max": max_iters - warmup.end}]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
load_from = "work_dirs/det/dinov2_s_dense_nuclei/iter_640.pth"
del warmup, decay
