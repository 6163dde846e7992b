"""EVA-02-B: 12 blocks of width 768, half of them global."""

_base_ = "eva02_l_1536.py"
model = dict(
    backbone=dict(
        embed_dim=768, depth=12, num_heads=12, drop_path_rate=0.1, global_blocks=(1, 3, 5, 7, 9, 11), with_cp=False
    ),
    neck=dict(in_channels=768),
)
