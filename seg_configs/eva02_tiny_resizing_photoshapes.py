"""Baseline on PhotoShapes, for testing only."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(**_base_.adaptive, merge="resizing"))
