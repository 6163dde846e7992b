"""MAE's ViT-L/16 at 336 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/mae_l_16_336.py"
