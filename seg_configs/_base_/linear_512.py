"""A linear probe at 512 pixels: the network stays as it is, and one linear layer reads its last map, after the final
norm. The models name the network and the head's channels."""

_base_ = "eva02_l_512.py"
model = dict(
    backbone=dict(_delete_=True, type="APTTimm", img_size=512, frozen=True, norm=True),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
