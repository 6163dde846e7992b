"""PhotoShapes, dense, trained from scratch."""

_base_ = ["_base_/eva02_tiny.py", "_base_/photoshapes.py", "_base_/schedule_photoshapes.py"]
