"""ImageNet, or any folder with a folder per class; models add their name and image size to the data sets."""

_base_ = "runtime.py"
loader = dict(num_workers=8, persistent_workers=True, collate_fn=dict(type="default_collate"))
train_dataloader = dict(
    **loader,
    batch_size=128,  # of 1024 in all: add GPUs, or let --auto-scale-lr scale the learning rate
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="FolderOfClasses", data_root="data/imagenet/train", is_training=True),
)
val_dataloader = dict(
    **loader,
    batch_size=64,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="FolderOfClasses", data_root="data/imagenet/val"),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="TopAccuracy")
val_cfg, test_cfg = dict(), dict()
auto_scale_lr = dict(enable=False, base_batch_size=1024)
# Thresholds of APT (arXiv 2510.18091, section 4.2), in bits of entropy, once for the adaptive models and their
# baselines, with patches of 16 and of 14 pixels. They are the paper's, which saw accuracy fall above 6.0;
# tools/calibrate.py finds those of a token budget on your images.
adaptive = dict(thresholds={32: 5.5, 64: 5.5})
adaptive_14 = dict(thresholds={28: 5.5, 56: 5.5})
del loader
