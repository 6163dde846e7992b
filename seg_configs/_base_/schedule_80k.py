"""EVA-02's recipe on ADE20K: 80k iterations of 16 images."""

optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=4e-5, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(decay_rate=0.9, decay_all=False),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
# Half precision as in training: attention over packed crops is fastest in it.
val_cfg = dict(type="ValLoop", fp16=True)
test_cfg = dict(type="TestLoop", fp16=True)
auto_scale_lr = dict(enable=False, base_batch_size=16)
