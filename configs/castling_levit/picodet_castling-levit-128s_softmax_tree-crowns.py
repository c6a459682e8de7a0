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
