_base_ = [
    "../_base_/models/gfl_fpn.py",
    "../_base_/datasets/coco_ms-crop.py",
    "../_base_/schedules/mvitv2_36e.py",
]

model = dict(
    backbone=dict(
        type="castling_det.CastlingMViT",
        arch="tiny",
        attention="softmax",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
