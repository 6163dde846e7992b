"""Baseline: as many tokens dropped at random as APT saves; nothing to train."""

_base_ = ["eva02_l_dense_512.py", "_base_/thresholds_ade20k.py"]
model = dict(backbone=dict(**_base_.adaptive, merge="random"))
