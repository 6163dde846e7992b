"""ViT-B/16 at 224 pixels, adaptive patches: one epoch from timm's fine-tuned model."""

_base_ = "vit_b_16_224_dense.py"
model = _base_.adaptive
