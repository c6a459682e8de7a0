# 100 epochs from scratch on 8 GPUs of 16 images each; --auto-scale-lr adapts the rate to other batch sizes.
_base_ = ["mmdet::_base_/default_runtime.py", "../custom_imports.py"]

max_epochs = 100
warmup_iters = 2000
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type="CosineAnnealingLR",
        eta_min_ratio=0.01,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    checkpoint=dict(type="castling_det.WholeCheckpointHook", interval=1, max_keep_ckpts=2, save_best="coco/bbox_mAP")
)
custom_hooks = [
    dict(type="castling_det.ClassCountHook"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.0002, update_buffers=True, priority=49),
]
auto_scale_lr = dict(enable=False, base_batch_size=128)
# BatchNorm of the stem over all GPUs.
sync_bn = "torch"
