"""ADE20K at 640 pixels: everything that is 512 pixels in ade20k_512.py, and its multiples, in proportion."""

_base_ = "ade20k_512.py"


def larger(steps):
    sizes = ("scale", "crop_size")
    return [{k: tuple(side * 640 // 512 for side in v) if k in sizes else v for k, v in s.items()} for s in steps]


train_pipeline = larger(_base_.train_pipeline)
test_pipeline = larger(_base_.test_pipeline)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1]["transforms"][0] = larger(tta_pipeline[1]["transforms"][0])
del larger
