# PicoDet's 300 epochs: SGD, cosine to zero after a linear warm-up, cycle-EMA. Published on 4 GPUs of 128 images each,
# here 8 of 64; --auto-scale-lr adapts the rate to other batch sizes.
_base_ = ["mmdet::_base_/default_runtime.py", "../custom_imports.py"]

max_epochs = 300
warmup_iters = 300
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# Without mixed precision, as published; --amp turns it on.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.4, momentum=0.9, weight_decay=4e-5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=warmup_iters),
    dict(
        type="CosineAnnealingLR",
        eta_min=0.0,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    checkpoint=dict(type="castling_det.WholeCheckpointHook", interval=10, max_keep_ckpts=2, save_best="coco/bbox_mAP")
)
custom_hooks = [
    dict(type="castling_det.ClassCountHook"),
    dict(type="castling_det.CycleEMAHook", cycle_epochs=40, momentum=0.0002, gamma=9, priority=49),
]
auto_scale_lr = dict(enable=False, base_batch_size=512)
