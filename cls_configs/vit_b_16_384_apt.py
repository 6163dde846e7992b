"""ViT-B/16 at 384 pixels, adaptive patches: one epoch from timm's fine-tuned model."""

_base_ = "vit_b_16_384_dense.py"
model = _base_.adaptive
