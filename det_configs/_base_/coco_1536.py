"""COCO with large-scale jitter; tests scale the longest side to 1536. Images are padded by the model."""

_base_ = "runtime.py"
size = (1536, 1536)
data_root = "data/coco/"
backend = "pillow"  # as detectron2: its bilinear filter widens when it shrinks; cv2's aliases
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomResize", scale=size, ratio_range=(0.1, 2.0), keep_ratio=True, resize_type="Resize", backend=backend
    ),
    dict(type="RandomCrop", crop_size=size, recompute_bbox=True, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True, backend=backend),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=1,  # of 128 in all: --accumulate or add GPUs, or let --auto-scale-lr scale the learning rate
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=data_root + "annotations/instances_val2017.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator
# Thresholds of APT (arXiv 2510.18091) for COCO at 1536 pixels, in bits of entropy, once for the adaptive models and
# their baselines. They are the paper's; tools/calibrate.py finds those of a token budget on your images.
adaptive = dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3})
# Instead of entropy a scorer that tools/distill_scorer.py makes from the dense model and your images, and interpolated
# maps (docs/learned_scorer.md); nothing is trained with labels. The threshold, in the scorer's nats, keeps 80 % of the
# tokens of COCO photographs at 448 pixels; tools/calibrate.py finds yours.
learned = dict(
    scorer="checkpoints/scorer.safetensors", thresholds={32: 0.008}, merge="resizing", map_fill="interpolate"
)
