"""MAE's ViT-B/16 at 384 pixels, adaptive patches: full fine-tuning from masked-image pretraining."""

_base_ = ["_base_/mae_b_16_384.py", "_base_/thresholds_p16.py"]
model = _base_.adaptive
