"""Thresholds of APT (arXiv 2510.18091, section 4.3) for ADE20K, in bits of entropy, once for the adaptive models and
their baselines. They are the paper's; tools/calibrate.py finds those of a token budget on your images."""

adaptive = dict(thresholds={32: 5.75})
