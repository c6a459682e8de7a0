_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "../_base_/datasets/coco_lsj_640.py",
    "../_base_/schedules/coco_8xb16-100e.py",
]

model = dict(backbone=dict(attention="softmax"))
