"""As vitdet_b_16_1024.py, with patches of 14 pixels: images are padded to 74 of them, and the pyramid's strides are
3.5, 7, 14, 28 and 56 pixels."""

_base_ = "vitdet_b_16_1024.py"
strides = [3.5, 7.0, 14.0, 28.0]
model = dict(
    data_preprocessor=dict(pad_size_divisor=1036),
    backbone=dict(img_size=1036),
    rpn_head=dict(anchor_generator=dict(strides=[*strides, 56.0])),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=strides), mask_roi_extractor=dict(featmap_strides=strides)),
)
