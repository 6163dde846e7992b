"""PhotoShapes (examples/make_photoshapes.py) for segmentation: shapes against background, at 160 pixels."""

_base_ = "runtime.py"
data_root = "data/photoshapes"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="CheckSegMap", num_classes=2),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.7, 1.4), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=(80, 80)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True, backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="CheckSegMap", num_classes=2),
    dict(type="PackSegInputs"),
]
training, validation = (
    dict(
        type="PhotoShapesDataset",
        data_root=data_root,
        data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
        pipeline=train_pipeline if split == "training" else test_pipeline,
    )
    for split in ("training", "validation")
)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=training
)
val_dataloader = test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=validation
)
# The second one counts only pixels within 3 pixels of a border between classes.
val_evaluator = [
    dict(type="IoUMetric", iou_metrics=["mIoU"]),
    dict(type="TrimapIoUMetric", iou_metrics=["mIoU"], width=3, prefix="border"),
]
test_evaluator = val_evaluator
# examples/photoshapes_results.py seg calibrates its own to a token budget. Scored by the Laplacian: entropy is low
# where two plain colours meet, as they do at many borders of PhotoShapes' objects, and a patch merged across a border
# blurs it.
adaptive = dict(scorer="laplacian", thresholds={8: 0.02})
# From the dense model's own probabilities (tools/distill_scorer.py); calibrated to as many tokens.
learned = dict(
    scorer="seg_configs/checkpoints/eva02_tiny_scorer_photoshapes.safetensors",
    thresholds={8: 0.001},
    merge="resizing",
    map_fill="interpolate",
)
del training, validation
