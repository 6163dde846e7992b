"""Text on scanned receipts (examples/make_receipts.py SRC data/receipts), against all else: images of which the longest
side is 784 pixels."""

_base_ = "nuclei.py"
data_root, scale = "data/receipts", (784, 784)
train_pipeline, test_pipeline = (
    [{**step, "scale": scale} if "scale" in step else step for step in steps]
    for steps in (_base_.train_pipeline, _base_.test_pipeline)
)
receipts = dict(data_root=data_root, img_suffix=".jpg", metainfo=dict(classes=("ground", "text")))
train_dataloader = dict(dataset=dict(**receipts, pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(dataset=dict(**receipts, pipeline=test_pipeline))
learned = dict(scorer="checkpoints/receipts_scorer.safetensors")
del receipts
