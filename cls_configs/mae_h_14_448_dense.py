"""MAE's ViT-H/14 at 448 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/mae_h_14_448.py"
