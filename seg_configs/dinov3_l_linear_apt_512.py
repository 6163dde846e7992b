"""DINOv3 ViT-L with a linear head at 512 pixels with adaptive patches, short fine-tuned from the dense model."""

_base_ = ["_base_/linear_512.py", "_base_/ade20k_512.py", "_base_/short_finetune_linear_4k.py"]
model = dict(
    type="ShortFinetuneEncoderDecoder",
    backbone=dict(model="vit_large_patch16_dinov3.lvd1689m", **_base_.adaptive),
    decode_head=dict(in_channels=1024, channels=1024),
)
load_from = "work_dirs/seg/dinov3_l_linear_dense_512/iter_80000.pth"
