"""mmseg's default runtime; the modules that register our parts, so that any mm script finds them."""

default_scope = "mmseg"
runner_type = "APTRunner"
custom_imports = dict(
    imports=["apt_backbones.mm", "apt_backbones.mm.seg", "apt_backbones.mm.seg_data", "apt_backbones.mm.upernet"]
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type="TokenCountHook")]
log_level = "INFO"
