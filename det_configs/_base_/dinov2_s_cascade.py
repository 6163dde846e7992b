"""A small Cascade R-CNN on the last map of the frozen DINOv2 ViT-S, with a training of 640 iterations. Data follow in
``_base_``, and the number of classes."""

_base_ = "cascade_vitdet.py"
channels, max_iters = 64, 640
strides = [3.5, 7.0, 14.0, 28.0]
head = dict(num_shared_convs=2, in_channels=channels, conv_out_channels=channels, fc_out_channels=256)
model = dict(
    data_preprocessor=dict(pad_size_divisor=14, pad_mask=False),
    backbone=dict(
        _delete_=True,
        type="APTTimm",
        model="vit_small_patch14_dinov2.lvd142m",
        checkpoint="checkpoints/vit_small_patch14_dinov2.lvd142m.safetensors",
        img_size=518,
        frozen=True,
        norm=True,
    ),
    neck=dict(in_channels=384, out_channels=channels),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, num_convs=1, anchor_generator=dict(strides=[*strides, 56.0])
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=strides),
        bbox_head=[{**stage, **head} for stage in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=None,
        mask_head=None,
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[{**stage, "sampler": {**stage.sampler, "num": 96}} for stage in _base_.model.train_cfg.rcnn],
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20, end=max_iters, T_max=max_iters - 20),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=320)
val_cfg, test_cfg = dict(type="ValLoop"), dict(type="TestLoop")
randomness = dict(seed=0)
