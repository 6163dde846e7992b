"""People on photographs of COCO val2017 (examples/make_persons.py data/coco data/coco/persons): images of which the
longest side is 448 pixels."""

_base_ = "runtime.py"
data_root = "data/coco/persons"
size, scale = (336, 336), (448, 448)
# Images are resized by Pillow, which filters: OpenCV's bilinear resampling aliases, and smaller images suffer most.
resized = dict(keep_ratio=True, backend="pillow")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # From half the test's size to more than it, so that the heads suit every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=scale, ratio_range=(0.45, 1.2), **resized),
    dict(type="RandomCrop", crop_size=size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, **resized),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
loader = dict(num_workers=1, persistent_workers=True)
tested = dict(**loader, batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
training, validation, test = (
    dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=dict(classes=("person",)),
        ann_file=f"{split}.json",
        data_prefix=dict(img="../val2017/"),
        test_mode=split != "training",
        pipeline=train_pipeline if split == "training" else test_pipeline,
    )
    for split in ("training", "validation", "test")
)
train_dataloader = dict(
    **loader,
    batch_size=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=training,
)
val_dataloader = dict(**tested, dataset=validation)
test_dataloader = dict(**tested, dataset=test)
val_evaluator, test_evaluator = (
    dict(type="CocoMetric", metric="bbox", ann_file=f"{data_root}/{dataset['ann_file']}")
    for dataset in (validation, test)
)
# The paper's threshold for detection, in bits of entropy, for both sizes; and what measurements favour instead
# (docs/equal_tokens.md), in the scorer's nats. tools/calibrate.py finds those of a token budget.
adaptive = dict(thresholds={28: 2.0, 56: 2.0})
learned = dict(
    scorer="checkpoints/persons_scorer.safetensors",
    thresholds={28: 0.32624, 56: 0.32624},
    merge="resizing",
    map_fill="interpolate",
)
del loader, tested, training, validation, test, resized
