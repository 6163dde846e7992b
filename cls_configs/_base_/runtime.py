"""mmengine's runtime, by epochs; the modules that register our parts, so that any mm script finds them."""

default_scope = "mmengine"
runner_type = "APTRunner"
custom_imports = dict(imports=["apt_backbones.mm", "apt_backbones.mm.cls"])
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [dict(type="TokenCountHook"), dict(type="ThroughputHook"), dict(type="ClassesHook")]
log_level = "INFO"
