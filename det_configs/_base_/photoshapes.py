"""PhotoShapes at 192 pixels (examples/make_photoshapes.py data/photoshapes) with a mild large-scale jitter; else as
coco_1536.py."""

_base_ = "coco_1536.py"
size = (192, 192)
data_root = "data/photoshapes/"
metainfo = dict(classes=("circle", "square", "triangle", "star", "ring", "cross"))
changes = dict(
    RandomResize=dict(scale=size, ratio_range=(0.75, 1.3)),
    RandomCrop=dict(crop_size=size),
    FilterAnnotations=dict(min_gt_bbox_wh=(2, 2)),
    Resize=dict(scale=size),
)
train_pipeline = [{**step, **changes.get(step["type"], {})} for step in _base_.train_pipeline]
test_pipeline = [{**step, **changes.get(step["type"], {})} for step in _base_.test_pipeline]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        _delete_=True,  # unlike COCO's, images without objects would stay
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_validation.json")
test_evaluator = val_evaluator
# Calibrated on the validation images without their annotations (examples/photoshapes_results.py det) to remove 27 % of
# the content's tokens. Scored by the Laplacian: entropy is low where two plain colours meet, as they do at many borders
# of PhotoShapes' objects, and patches merged across a border cost precision.
adaptive = dict(_delete_=True, scorer="laplacian", thresholds={16: 0.0155, 32: 0.0046})
# From the dense model's features (tools/distill_scorer.py); calibrated to as many tokens.
learned = dict(
    _delete_=True,
    scorer="det_configs/checkpoints/eva02_tiny_scorer_photoshapes.safetensors",
    thresholds={16: 0.1, 32: 0.1},
    merge="resizing",
    map_fill="interpolate",
)
del changes
