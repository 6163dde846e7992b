"""A small Cascade R-CNN on the last map of the frozen DINOv2 ViT-S, on nuclei; an hour of one CPU core."""

_base_ = ["_base_/dinov2_s_cascade.py", "_base_/nuclei.py"]
model = dict(
    roi_head=dict(bbox_head=[{**stage, "num_classes": 1} for stage in _base_.model.roi_head.bbox_head]),
    # Up to 375 nuclei are in an image.
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=400), rcnn=dict(max_per_img=400)),
)
