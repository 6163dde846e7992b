"""EVA-02-L, 640 pixels, dense: the published model."""

_base_ = ["_base_/eva02_l_640.py", "_base_/ade20k_640.py", "_base_/schedule_80k.py"]
