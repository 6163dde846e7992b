"""ViT-H/14 at 336 pixels, adaptive patches: one epoch from timm's fine-tuned model."""

_base_ = "vit_h_14_336_dense.py"
model = _base_.adaptive_14
