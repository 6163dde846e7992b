"""A small Cascade R-CNN on the last map of the frozen DINOv2 ViT-S, on BCCD; an hour of one CPU core."""

_base_ = ["_base_/dinov2_s_cascade.py", "_base_/bccd.py"]
model = dict(roi_head=dict(bbox_head=[{**stage, "num_classes": 3} for stage in _base_.model.roi_head.bbox_head]))
