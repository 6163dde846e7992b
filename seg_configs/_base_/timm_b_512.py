"""A ViT-B/16 of timm + UperNet at 512 pixels."""

_base_ = "eva02_b_512.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="APTTimm",
        model="vit_base_patch16_dinov3.lvd1689m",
        img_size=512,
        drop_path_rate=0.15,
        out_indices=(3, 5, 7, 11),
    )
)
