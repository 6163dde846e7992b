"""A linear head on three maps of the frozen DINOv2 ViT-S, on receipts; half an hour of one CPU core."""

_base_ = ["_base_/dinov2_s_linear.py", "_base_/receipts.py"]
model = dict(data_preprocessor=dict(size=_base_.size), decode_head=dict(num_classes=2))
