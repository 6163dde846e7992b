"""A plain ViT-B/16 of timm at 1024 pixels as ViTDet (arXiv 2203.16527) has it: four global blocks, windows elsewhere.

Windows are of 16 cells, where ViTDet has 14: a window must be a multiple of the largest patch (8 cells). Nothing in
these networks depends on the window's size. Prefix tokens stay out, as in ViTDet.
"""

_base_ = "cascade_vitdet.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type="APTTimm",
        model="vit_base_patch16_224.mae",
        img_size=1024,
        keep_prefix=False,
        window_size=16,
        global_blocks=(2, 5, 8, 11),
        drop_path_rate=0.1,
        test_dtype="float16",
    ),
    neck=dict(in_channels=768),
)
