"""UperNet on the frozen DINOv2 ViT-S, on receipts; 40 minutes of one CPU core."""

_base_ = ["_base_/dinov2_s_upernet.py", "_base_/receipts.py"]
model = dict(data_preprocessor=dict(size=_base_.size), decode_head=dict(num_classes=2))
