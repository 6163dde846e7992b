"""EVA-02-B, 512 pixels, dense: the published model."""

_base_ = ["_base_/eva02_b_512.py", "_base_/ade20k_512.py", "_base_/schedule_60k_b.py"]
train_dataloader = dict(batch_size=4)
