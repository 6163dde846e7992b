"""EVA-02's fine-tuning recipe on COCO: 60k iterations of 128 images; use --amp as the reference does."""

max_iters = 60000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.8, decay_all=True),
    optimizer=dict(type="AdamW", lr=5e-5, betas=(0.9, 0.999), weight_decay=0.1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, milestones=[max_iters * 8 // 10, max_iters * 9 // 10], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=128)
