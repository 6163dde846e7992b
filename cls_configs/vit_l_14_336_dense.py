"""ViT-L/14 at 336 pixels, dense: timm's fine-tuned model; training is one more epoch, as the adaptive ones have it."""

_base_ = "_base_/vit_l_14_336.py"
