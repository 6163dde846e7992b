"""A small Cascade R-CNN on the last map of the frozen DINOv2 ViT-S, for people; an hour of one CPU core."""

_base_ = ["_base_/dinov2_s_cascade.py", "_base_/persons.py"]
max_iters = 960
model = dict(roi_head=dict(bbox_head=[{**stage, "num_classes": 1} for stage in _base_.model.roi_head.bbox_head]))
warmup, decay = _base_.param_scheduler
param_scheduler = [warmup, {**decay, "end": max_iters, "T_max": max_iters - warmup.end}]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
del warmup, decay
