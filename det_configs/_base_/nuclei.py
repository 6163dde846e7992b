"""Nuclei under a microscope (examples/make_nuclei.py SRC data/nuclei): images of which the longest side is 448
pixels."""

_base_ = "runtime.py"
data_root = "data/nuclei"
size, scale = (336, 336), (448, 448)
# Images are resized by Pillow, which filters: OpenCV's bilinear resampling aliases, and smaller images suffer most.
resized = dict(keep_ratio=True, backend="pillow")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # Smaller and larger than the test's, so that the heads suit every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 1.2), **resized),
    dict(type="RandomCrop", crop_size=size),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, **resized),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
loader = dict(num_workers=1, persistent_workers=True)
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=("nucleus",)))
train_dataloader = dict(
    **loader,
    batch_size=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    **loader,
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    **loader,
    batch_size=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_test.json",
        data_prefix=dict(img="images/test/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", metric="bbox", ann_file=f"{data_root}/annotations/instances_validation.json")
test_evaluator = dict(type="CocoMetric", metric="bbox", ann_file=f"{data_root}/annotations/instances_test.json")
# The paper's threshold for detection, in bits of entropy; and what measurements favour instead
# (docs/learned_scorer.md), in the scorer's nats. tools/calibrate.py finds those of a token budget.
adaptive = dict(thresholds={28: 2.0})
learned = dict(
    scorer="checkpoints/nuclei_boxes_scorer.safetensors",
    thresholds={28: 0.002},
    merge="resizing",
    map_fill="interpolate",
)
del loader, dataset, resized
