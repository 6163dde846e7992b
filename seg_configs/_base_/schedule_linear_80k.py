"""As schedule_80k.py, for one linear layer: at a larger rate, and without layer decay."""

_base_ = "schedule_80k.py"
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(decay_rate=1.0))
