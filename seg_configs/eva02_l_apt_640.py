"""Adaptive patches, short fine-tuned from the dense model."""

_base_ = ["_base_/eva02_l_640.py", "_base_/ade20k_640.py", "_base_/short_finetune_4k.py"]
model = dict(type="ShortFinetuneEncoderDecoder", backbone=_base_.adaptive)
load_from = "checkpoints/eva02_l_seg_640.pth"
