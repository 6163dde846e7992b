"""EVA-02's recipe for the base model on ADE20K: 60k iterations of 32 images."""

_base_ = "schedule_80k.py"
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.85))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
train_cfg = dict(max_iters=60000)
auto_scale_lr = dict(base_batch_size=32)
