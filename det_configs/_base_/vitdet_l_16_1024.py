"""As vitdet_b_16_1024.py, with ViT-L; activations are recomputed in training."""

_base_ = "vitdet_b_16_1024.py"
model = dict(
    backbone=dict(model="vit_large_patch16_224.mae", global_blocks=(5, 11, 17, 23), drop_path_rate=0.4, with_cp=True),
    neck=dict(in_channels=1024),
)
