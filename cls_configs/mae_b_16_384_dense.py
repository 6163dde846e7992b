"""MAE's ViT-B/16 at 384 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/mae_b_16_384.py"
