"""Baseline on PhotoShapes, for testing only."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(thresholds={8: 0.02}, scorer="laplacian", merge="random"))
