"""EVA-02-B: 12 blocks of width 768, half of them global."""

_base_ = "cascade_vitdet.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=1536),
    backbone=dict(
        img_size=1536,
        test_dtype="float16",
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        window_size=32,
        global_blocks=(1, 3, 5, 7, 9, 11),
    ),
    neck=dict(in_channels=768),
)
