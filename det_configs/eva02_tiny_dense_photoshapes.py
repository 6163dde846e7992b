"""Dense training from scratch."""

_base_ = ["_base_/eva02_tiny.py", "_base_/photoshapes.py", "_base_/schedule_photoshapes.py"]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
