"""Thresholds of APT (arXiv 2510.18091) for COCO at 1536 pixels, in bits of entropy, once for the adaptive models and
their baselines. They are the paper's; tools/calibrate.py finds those of a token budget on your images."""

adaptive = dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3})
