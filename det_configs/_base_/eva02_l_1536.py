"""EVA-02-L: 24 blocks of width 1024, every third one global; activations are recomputed in training."""

_base_ = "cascade_vitdet.py"
model = dict(
    data_preprocessor=dict(pad_size_divisor=1536),
    backbone=dict(
        img_size=1536,
        test_dtype="float16",
        embed_dim=1024,
        depth=24,
        num_heads=16,
        drop_path_rate=0.4,
        window_size=32,
        global_blocks=(2, 5, 8, 11, 14, 17, 20, 23),
        with_cp=True,
    ),
    neck=dict(in_channels=1024),
)
