"""BCCD, blood cells under a microscope, as github.com/Shenggan/BCCD_Dataset has it (its folder BCCD): whole images at
392 x 294 pixels, which is the best size of some for the dense model on the val split."""

_base_ = "runtime.py"
data_root = "data/bccd"
size, crop_size = (294, 392), (336, 448)
# Images are resized by Pillow, which filters: OpenCV's bilinear resampling aliases, and smaller images suffer most.
resized = dict(keep_ratio=True, backend="pillow")
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # From half the test's size to more than it, so that the heads suit every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=(308, 231), ratio_range=(0.6, 1.5), **resized),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size[::-1], **resized),
    dict(type="LoadAnnotations", with_bbox=True),
    # The evaluator has no file of COCO's, and makes its own of the instances.
    dict(type="PackDetInputs", meta_keys=(*meta_keys, "instances")),
]
loader = dict(num_workers=1, persistent_workers=True)
tested = dict(**loader, batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
training, validation, test = (
    dict(
        type="XMLDataset",
        data_root=data_root,
        metainfo=dict(classes=("RBC", "WBC", "Platelets")),
        ann_file=f"ImageSets/Main/{split}.txt",
        data_prefix=dict(sub_data_root=""),
        test_mode=split != "train",
        pipeline=train_pipeline if split == "train" else test_pipeline,
    )
    for split in ("train", "val", "test")
)
train_dataloader = dict(**loader, batch_size=8, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=training)
val_dataloader = dict(**tested, dataset=validation)
test_dataloader = dict(**tested, dataset=test)
val_evaluator = test_evaluator = dict(type="CocoMetric", metric="bbox")
# The paper's threshold for detection, in bits of entropy; and what measurements favour instead
# (docs/equal_tokens.md), in the scorer's nats. tools/calibrate.py finds those of a token budget.
adaptive = dict(thresholds={28: 2.0})
learned = dict(
    scorer="checkpoints/bccd_scorer.safetensors", thresholds={28: 0.59114}, merge="resizing", map_fill="interpolate"
)
del loader, tested, training, validation, test, resized, meta_keys
