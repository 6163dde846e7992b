"""As thresholds_p16.py, for patches of 14 pixels."""

adaptive = dict(thresholds={28: 5.5, 56: 5.5})
