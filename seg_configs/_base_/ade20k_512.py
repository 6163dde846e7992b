"""ADE20K as mmseg prepares it, at 512 pixels; masks are checked against the classes."""

_base_ = "runtime.py"
data_root = "data/ade/ADEChallengeData2016"
load_mask = [dict(type="LoadAnnotations", reduce_zero_label=True), dict(type="CheckSegMap", num_classes=150)]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    *load_mask,
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    *load_mask,
    dict(type="PackSegInputs"),
]
# 16 images per iteration, on eight GPUs.
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="ADE20KDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ADE20KDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
# Thresholds of APT (arXiv 2510.18091, section 4.3) for ADE20K, in bits of entropy, once for the adaptive models and
# their baselines, with patches of 16 and of 14 pixels. They are the paper's; tools/calibrate.py finds those of a token
# budget on your images.
adaptive = dict(thresholds={32: 5.75})
adaptive_14 = dict(thresholds={28: 5.75})
# What measurements favour instead (docs/equal_tokens.md): patches chosen by a scorer that tools/distill_scorer.py
# makes from the dense model and your images, and interpolated maps; nothing is trained with labels. The threshold, in
# the scorer's nats, is that which keeps 75 % of CamVid's tokens without a loss; tools/calibrate.py finds yours.
recommended = dict(scorer="checkpoints/scorer.safetensors", merge="resizing", map_fill="interpolate")
learned = dict(**recommended, thresholds={32: 0.02})
learned_14 = dict(**recommended, thresholds={28: 0.02})

# Multi-scale and mirrored, for --tta and the _ms configs. Scales are relative to the single-scale test's.
img_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(2048 * r), int(512 * r)), keep_ratio=True) for r in img_ratios],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", reduce_zero_label=True)],
            [dict(type="CheckSegMap", num_classes=150)],
            [dict(type="PackSegInputs")],
        ],
    ),
]
tta_model = dict(type="SegTTAModel")
