"""PhotoShapes (tools/make_photoshapes.py) for segmentation: background and six shapes; images scaled to 112 pixels."""

data_root = "data/photoshapes"
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    reduce_zero_label=True,
    metainfo=dict(
        classes=("background", "circle", "square", "triangle", "star", "ring", "cross"),
        palette=[
            [128, 128, 128],
            [220, 50, 47],
            [38, 139, 210],
            [133, 153, 0],
            [181, 137, 0],
            [211, 54, 130],
            [42, 161, 152],
        ],
    ),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="CheckSegMap", num_classes=7),
    dict(type="RandomResize", scale=(112, 112), ratio_range=(0.7, 1.4), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=(80, 80), cat_max_ratio=0.8),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(112, 112), keep_ratio=True, backend="pillow"),
    dict(type="LoadAnnotations"),
    dict(type="CheckSegMap", num_classes=7),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# The second one counts only pixels within 3 pixels of a border between classes.
val_evaluator = [
    dict(type="IoUMetric", iou_metrics=["mIoU"]),
    dict(type="BoundaryIoUMetric", iou_metrics=["mIoU"], width=3, prefix="border"),
]
test_evaluator = val_evaluator
