"""Adaptive patches, short fine-tuned from the dense model: 5 % of its 60k iterations at a tenth of its rate."""

_base_ = ["_base_/eva02_b_512.py", "_base_/ade20k_512.py", "_base_/schedule_60k_b.py"]
model = dict(type="ShortFinetuneEncoderDecoder", backbone=_base_.adaptive)
optim_wrapper = dict(optimizer=dict(lr=6e-6))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=75),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=75, end=3000),
]
train_cfg = dict(max_iters=3000, val_interval=1000)
train_dataloader = dict(batch_size=4)
load_from = "checkpoints/eva02_b_seg_512.pth"
