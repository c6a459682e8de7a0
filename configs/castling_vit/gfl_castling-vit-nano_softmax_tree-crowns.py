_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "../_base_/datasets/tree_crowns.py",
    "../_base_/schedules/tree_crowns_2400it.py",
]

model = dict(
    backbone=dict(attention="softmax", img_size=192),
    # Crowns are 12 to 56 pixels wide, one class, and rarely overlap by much.
    bbox_head=dict(num_classes=1, anchor_generator=dict(octave_base_scale=4)),
    train_cfg=dict(assigner=dict(ignore_iof_thr=0.5)),
    test_cfg=dict(nms=dict(iou_threshold=0.4)),
)
