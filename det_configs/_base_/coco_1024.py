"""COCO at 1024 pixels: everything that is 1536 pixels in coco_1536.py."""

_base_ = "coco_1536.py"


def smaller(steps):
    return [{k: (1024, 1024) if k in ("scale", "crop_size") else v for k, v in step.items()} for step in steps]


train_pipeline = smaller(_base_.train_pipeline)
test_pipeline = smaller(_base_.test_pipeline)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# Thresholds are those for 1536 pixels, with which little of a photograph's content merges; for patches of 14 pixels:
adaptive_14 = dict(thresholds={28: 2.0, 56: 2.0, 112: 0.3})
del smaller
