"""ViT-H/14 at 224 pixels, dense: timm's fine-tuned model; training is one more epoch, as the adaptive ones have it."""

_base_ = "_base_/vit_h_14_224.py"
