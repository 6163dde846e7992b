"""DINOv2 ViT-B + UperNet at 512 pixels with adaptive patches, short fine-tuned from the dense model."""

_base_ = ["_base_/timm_b_512.py", "_base_/ade20k_512.py", "_base_/short_finetune_4k.py"]
model = dict(
    type="ShortFinetuneEncoderDecoder",
    backbone=dict(model="vit_base_patch14_dinov2.lvd142m", **_base_.adaptive_14, img_size=518),
)
load_from = "work_dirs/seg/dinov2_b_dense_512/iter_80000.pth"
