"""As short_finetune_4k.py, for a model whose head was trained by schedule_linear_80k.py."""

_base_ = "short_finetune_4k.py"
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=1.0))
