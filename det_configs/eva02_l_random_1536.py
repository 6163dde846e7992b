"""Baseline: as many base patches dropped at random as adaptive patches would save; nothing to train."""

_base_ = "eva02_l_dense_1536.py"
model = dict(backbone=dict(**_base_.adaptive, merge="random"))
