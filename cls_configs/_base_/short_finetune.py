"""From a fine-tuned model (APT, arXiv 2510.18091, section 4.2): one epoch of the whole network, not augmented."""

_base_ = "imagenet.py"
train_dataloader = dict(dataset=dict(transform=dict(no_aug=True)))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-6, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.99, decay_all=False),
)
