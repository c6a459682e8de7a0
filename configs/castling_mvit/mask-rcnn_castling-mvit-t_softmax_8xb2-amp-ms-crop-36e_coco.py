_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/mvitv2_36e.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="castling_det.CastlingMViT",
        arch="tiny",
        attention="softmax",
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
