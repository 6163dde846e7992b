"""EVA-02-L + UperNet at 640 pixels, with wider heads."""

_base_ = "eva02_l_512.py"
crop_size = (640, 640)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=640, pretrain_img_size=640),
    decode_head=dict(channels=1536),
    auxiliary_head=dict(channels=1536),
    test_cfg=dict(crop_size=crop_size, stride=(426, 426)),
)
