_base_ = [
    "../_base_/models/picodet_csppan_pico-head.py",
    "../_base_/datasets/tree_crowns.py",
    "../_base_/schedules/tree_crowns_2400it.py",
]

model = dict(
    # The tiles have one size: nothing to draw for each batch.
    data_preprocessor=dict(pad_size_divisor=64, batch_augments=None),
    backbone=dict(type="castling_det.CastlingLeViT", arch="128S", attention="softmax", img_size=192, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 384]),
    bbox_head=dict(num_classes=1),
    test_cfg=dict(nms=dict(iou_threshold=0.4)),
)

# Half of the schedule, and a longer average: with 7 million parameters on a few hundred trees, what the learning rate's
# fall still adds is learnt by heart, and the moving average of the weights stands in for it.
max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 4)
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
custom_hooks = [
    dict(type="castling_det.ClassCountHook"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.003, gamma=50, update_buffers=True, priority=49),
]
