# ViTDet's 100 epochs: AdamW with a learning rate that decays from layer to layer, mixed precision, batches of 64
# images: 8 GPUs of 2, gradients of 4 iterations averaged. On larger GPUs 8 of 8 at once is the same.
_base_ = ["mmdet::_base_/default_runtime.py", "../custom_imports.py"]

max_epochs = 100
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="castling_det.LayerDecayOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(decay_rate=0.7, norm_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))),
    accumulative_counts=4,
)
# Published in updates of 64 images: 250 of warm-up, steps after 163889 and 177546 of 184375.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=max_epochs, by_epoch=True, milestones=[89, 96], gamma=0.1),
]
default_hooks = dict(
    checkpoint=dict(type="castling_det.WholeCheckpointHook", interval=5, max_keep_ckpts=2, save_best="coco/bbox_mAP")
)
custom_hooks = [dict(type="castling_det.ClassCountHook")]
auto_scale_lr = dict(enable=False, base_batch_size=16)
