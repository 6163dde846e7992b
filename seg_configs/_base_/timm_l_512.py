"""A ViT-L/16 of timm + UperNet at 512 pixels."""

_base_ = "eva02_l_512.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="APTTimm",
        model="vit_large_patch16_dinov3.lvd1689m",
        img_size=512,
        drop_path_rate=0.2,
        out_indices=(7, 11, 15, 23),
    )
)
