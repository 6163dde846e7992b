"""As thresholds_16_1024.py, for patches of 14 pixels."""

adaptive = dict(thresholds={28: 2.0, 56: 2.0, 112: 0.3})
