"""People on photographs of COCO val2017 (examples/make_persons.py data/coco data/coco/persons): images of which the
longest side is 448 pixels, as those of nuclei."""

_base_ = "nuclei.py"
data_root = "data/coco/persons"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # From half the test's size to more than it, so that the heads suit every size that tools/equal_tokens.py compares.
    dict(type="RandomResize", scale=_base_.scale, ratio_range=(0.45, 1.2), keep_ratio=True, backend="pillow"),
    dict(type="RandomCrop", crop_size=_base_.size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(type="PackDetInputs"),
]
persons = dict(data_root=data_root, metainfo=dict(classes=("person",)), data_prefix=dict(img="../val2017/"))
train_dataloader = dict(
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(**persons, ann_file="training.json", pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(**persons, ann_file="validation.json"))
test_dataloader = dict(dataset=dict(**persons, ann_file="test.json"))
val_evaluator = dict(ann_file=f"{data_root}/validation.json")
test_evaluator = dict(ann_file=f"{data_root}/test.json")
learned = dict(scorer="checkpoints/persons_scorer.safetensors", thresholds={28: 0.32624, 56: 0.32624})
del persons
