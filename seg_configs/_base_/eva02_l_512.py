"""EVA-02-L + UperNet at 512 pixels (EVA-02, arXiv 2303.11331, semantic segmentation)."""

norm_cfg = dict(type="SyncBN", requires_grad=True)
crop_size = (512, 512)
model = dict(
    type="APTEncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type="APTEva02",
        img_size=512,
        pretrain_img_size=512,
        patch_size=16,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        drop_path_rate=0.2,
        use_cls_token=True,
        out_indices=(7, 11, 15, 23),
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=1024, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type="FastUPerHead",
        inference="fast",
        in_channels=[1024, 1024, 1024, 1024],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=1024,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    # As many crops at a time as have 8192 tokens together: eight dense ones at 512 pixels.
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341), token_budget=8192),
)
