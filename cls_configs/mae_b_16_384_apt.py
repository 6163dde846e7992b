"""MAE's ViT-B/16 at 384 pixels, adaptive patches: full fine-tuning from masked-image pretraining."""

_base_ = "mae_b_16_384_dense.py"
model = _base_.adaptive
