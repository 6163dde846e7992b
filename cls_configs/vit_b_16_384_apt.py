"""ViT-B/16 at 384 pixels, adaptive patches: one epoch from timm's fine-tuned model."""

_base_ = ["_base_/vit_b_16_384.py", "_base_/thresholds_p16.py"]
model = _base_.adaptive
