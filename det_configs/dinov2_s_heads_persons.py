"""Heads that learn to read merged patches, of images of which the longest side is 308 pixels: a short fine-tune of the
dense detector, 18 minutes of one CPU core."""

_base_ = "dinov2_s_learned_persons.py"
max_iters, scale = 320, (308, 308)
load, annotations, resize, *augment = _base_.train_pipeline
train_pipeline = [load, annotations, {**resize, "scale": scale, "ratio_range": (0.6, 1.2)}, *augment]
load, resize, pack = _base_.test_pipeline
test_pipeline = [load, {**resize, "scale": scale}, pack]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
warmup, decay = _base_.param_scheduler
param_scheduler = [warmup, {**decay, "end": max_iters, "T_max": max_iters - warmup.end}]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
load_from = "work_dirs/det/dinov2_s_dense_persons/iter_960.pth"
del load, annotations, resize, augment, pack, warmup, decay
