"""PhotoShapes, dense, from scratch: about half an hour on one CPU core."""

_base_ = ["_base_/eva02_tiny.py", "_base_/photoshapes.py", "_base_/runtime.py"]
max_iters = 1600
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=80),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=80, end=max_iters),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=400)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
