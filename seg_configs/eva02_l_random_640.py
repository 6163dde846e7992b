"""Baseline: as many tokens dropped at random as APT saves; nothing to train."""

_base_ = "eva02_l_dense_640.py"
model = dict(backbone=dict(**_base_.adaptive, merge="random"))
