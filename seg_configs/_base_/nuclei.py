"""Nuclei under a microscope (examples/make_nuclei.py SRC data/nuclei), against all else: images of which the longest
side is 448 pixels."""

_base_ = "runtime.py"
data_root = "data/nuclei"
size, scale = (336, 336), (448, 448)
# Images are resized by Pillow, which filters: OpenCV's bilinear resampling aliases, and smaller images suffer most.
load_mask = [dict(type="LoadAnnotations"), dict(type="CheckSegMap", num_classes=2)]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    *load_mask,
    # Smaller and larger than the test's, so that the head suits every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=scale, ratio_range=(0.6, 1.5), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=size),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True, backend="pillow"),
    *load_mask,
    dict(type="PackSegInputs"),
]
loader = dict(num_workers=1, persistent_workers=True)
tested = dict(**loader, batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
training, validation, test = (
    dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=dict(classes=("background", "nucleus"), palette=[[128, 128, 128], [220, 50, 47]]),
        img_suffix=".png",
        data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
        pipeline=train_pipeline if split == "training" else test_pipeline,
    )
    for split in ("training", "validation", "test")
)
train_dataloader = dict(**loader, batch_size=8, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=training)
val_dataloader = dict(**tested, dataset=validation)
test_dataloader = dict(**tested, dataset=test)
# The second one counts only pixels within 3 pixels of a border between classes.
val_evaluator = test_evaluator = [
    dict(type="IoUMetric", iou_metrics=["mIoU"]),
    dict(type="TrimapIoUMetric", iou_metrics=["mIoU"], width=3, prefix="border"),
]
# The paper's threshold for segmentation, in bits of entropy, for both sizes; and what measurements favour instead
# (docs/equal_tokens.md), in the scorer's nats. tools/calibrate.py finds those of a token budget.
adaptive = dict(thresholds={28: 5.75, 56: 5.75})
learned = dict(
    scorer="checkpoints/nuclei_scorer.safetensors",
    thresholds={28: 0.01, 56: 0.01},
    merge="resizing",
    map_fill="interpolate",
)
del loader, tested, training, validation, test, load_mask
