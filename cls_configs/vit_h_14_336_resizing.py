"""ViT-H/14 at 336 pixels, merged patches without new layers: one epoch from timm's fine-tuned model."""

_base_ = ["_base_/vit_h_14_336.py", "_base_/thresholds_p14.py"]
model = dict(**_base_.adaptive, merge="resizing")
