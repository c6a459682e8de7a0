# 2400 iterations from scratch, minutes on two CPU cores: the demo's recipe, the same for every attention.
_base_ = ["mmdet::_base_/default_runtime.py", "../custom_imports.py"]

max_iters = 2400
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters // 4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=40, end=max_iters, T_max=max_iters - 40),
]
default_hooks = dict(
    logger=dict(interval=20),
    exact_resume=dict(type="castling_det.ExactResumeHook"),
    checkpoint=dict(type="castling_det.WholeCheckpointHook", by_epoch=False, interval=max_iters // 4, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False, window_size=20)
custom_hooks = [
    dict(type="castling_det.ClassCountHook"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.01, gamma=50, update_buffers=True, priority=49),
]
# train.py --auto-scale-lr: the rate is meant for four images an iteration.
auto_scale_lr = dict(enable=False, base_batch_size=4)
