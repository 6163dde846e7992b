"""From masked-image pretraining: MAE's fine-tuning (arXiv 2111.06377, table 9) with the learning rate of APT."""

_base_ = "imagenet.py"
max_epochs = 100
train_dataloader = dict(
    dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel"))
)
model = dict(new_classifier=True, mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1))
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.75, decay_all=False),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=5, end=max_epochs, convert_to_iter_based=True),
]
