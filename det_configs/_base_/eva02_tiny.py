"""The same detector, small enough to train on two CPU cores: 192 pixels, patch 8, 3 x 3 windows of 8 x 8 cells."""

_base_ = "cascade_vitdet.py"

channels = 32
strides = [2, 4, 8, 16]
head = dict(num_shared_convs=2, in_channels=channels, conv_out_channels=channels, fc_out_channels=128, num_classes=6)
extractor = dict(out_channels=channels, featmap_strides=strides, finest_scale=28)
model = dict(
    data_preprocessor=dict(pad_size_divisor=192),
    backbone=dict(
        img_size=192,
        patch_size=8,
        pretrain_img_size=192,
        embed_dim=96,
        depth=4,
        num_heads=3,
        window_size=8,
        global_blocks=(1, 3),
    ),
    neck=dict(in_channels=96, out_channels=channels),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, num_convs=1, anchor_generator=dict(strides=[*strides, 32])
    ),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=[{**stage, **head} for stage in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=extractor,
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=6),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=[{**stage, "sampler": {**stage.sampler, "num": 32}} for stage in _base_.model.train_cfg.rcnn],
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)
