"""As full_finetune.py, 50 epochs: for ViT-L and ViT-H."""

_base_ = "full_finetune.py"
max_epochs = 50
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1]["end"] = max_epochs
