"""A linear head on three maps of the frozen DINOv2 ViT-S, with a training of 400 iterations. Data follow in ``_base_``,
and the number of classes."""

_base_ = "linear_512.py"
model = dict(
    backbone=dict(
        model="vit_small_patch14_dinov2.lvd142m",
        checkpoint="checkpoints/vit_small_patch14_dinov2.lvd142m.safetensors",
        img_size=518,
        out_indices=(5, 8, 11),
    ),
    decode_head=dict(in_channels=[384, 384, 384], in_index=[0, 1, 2], input_transform="resize_concat", channels=1152),
    test_cfg=dict(_delete_=True, mode="whole"),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05))
param_scheduler = [dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=400)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=400, val_interval=200)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
randomness = dict(seed=0)
