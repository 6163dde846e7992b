"""MAE's ViT-L/16 at 336 pixels, adaptive patches: full fine-tuning from masked-image pretraining."""

_base_ = "mae_l_16_336_dense.py"
model = _base_.adaptive
