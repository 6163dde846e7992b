"""In bits of entropy, for patches of 16 pixels; once for the adaptive models and their baselines. They are APT's for
COCO at 1536 pixels (arXiv 2510.18091), with which little of a photograph's content merges: tools/calibrate.py finds
those of a token budget on your images."""

adaptive = dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3})
