"""MAE's ViT-H/14 at 448 pixels, adaptive patches: full fine-tuning from masked-image pretraining."""

_base_ = "mae_h_14_448_dense.py"
model = _base_.adaptive_14
