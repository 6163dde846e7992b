"""Thresholds of APT (arXiv 2510.18091, section 4.2) for patches of 16 pixels, in bits of entropy, once for the adaptive
models and their baselines. They are the paper's, which saw accuracy fall above 6.0; tools/calibrate.py finds those of a
token budget on your images."""

adaptive = dict(thresholds={32: 5.5, 64: 5.5})
