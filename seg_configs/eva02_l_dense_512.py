"""EVA-02-L, 512 pixels, dense: the published model."""

_base_ = ["_base_/eva02_l_512.py", "_base_/ade20k_512.py", "_base_/schedule_80k.py"]
