"""UperNet of 64 channels on four maps of the frozen DINOv2 ViT-S, trained as the linear head is. Data follow in
``_base_``, and the number of classes."""

_base_ = "dinov2_s_linear.py"
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(out_indices=(2, 5, 8, 11)),
    neck=dict(_delete_=True, type="Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        _delete_=True,
        type="FastUPerHead",
        inference="fast",
        in_channels=[384, 384, 384, 384],
        in_index=[0, 1, 2, 3],
        channels=64,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
)
