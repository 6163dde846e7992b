"""EVA-02-B + UperNet at 512 pixels."""

_base_ = "eva02_l_512.py"
model = dict(
    backbone=dict(embed_dim=768, depth=12, num_heads=12, drop_path_rate=0.15, out_indices=(3, 5, 7, 11)),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=768),
    auxiliary_head=dict(in_channels=768),
)
