"""ViT-B/16 at 384 pixels, dense: timm's fine-tuned model; training is one more epoch, as the adaptive ones have it."""

_base_ = "_base_/vit_b_16_384.py"
