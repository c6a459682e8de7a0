# MViTv2's 36 epochs: AdamW, mixed precision, batches of 64 images: 8 GPUs of 2, gradients of 4 iterations averaged.
# On larger GPUs 8 of 8 at once is the same.
_base_ = ["mmdet::_base_/default_runtime.py", "../custom_imports.py"]

max_epochs = 36
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1.6e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(rel_pos=dict(decay_mult=0.0))),
    accumulative_counts=4,
)
# Published in updates of 64 images: 250 of warm-up, steps after 52500 and 62500 of 67500.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[28, 33], gamma=0.1),
]
default_hooks = dict(
    checkpoint=dict(type="castling_det.WholeCheckpointHook", max_keep_ckpts=2, save_best="coco/bbox_mAP")
)
custom_hooks = [dict(type="castling_det.ClassCountHook")]
auto_scale_lr = dict(enable=False, base_batch_size=16)
