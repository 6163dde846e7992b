"""A network that trains on two CPU cores: EVA-02 + UperNet as the large ones, patch 4, crops of 80 pixels."""

norm_cfg = dict(type="BN", requires_grad=True)
crop_size = (80, 80)
class_weight = [0.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]  # background is nine pixels of ten
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
        img_size=80,
        pretrain_img_size=80,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=2,
        use_cls_token=True,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(type="Feature2Pyramid", embed_dim=64, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),
    decode_head=dict(
        type="UPerHead",
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=32,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, class_weight=class_weight),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=64,
        in_index=2,
        channels=32,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=7,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4, class_weight=class_weight),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(53, 53), token_budget=4096),
)
