"""As thresholds_ade20k.py, for patches of 14 pixels."""

adaptive = dict(thresholds={28: 5.75})
