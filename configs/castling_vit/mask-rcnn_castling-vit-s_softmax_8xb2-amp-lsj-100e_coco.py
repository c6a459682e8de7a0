# ViTDet's recipe; attention in every block over the whole map, no windows.
_base_ = [
    "../_base_/models/mask-rcnn_vitdet.py",
    "../_base_/datasets/coco_instance_lsj_1024.py",
    "../_base_/schedules/vitdet_100e.py",
]

model = dict(backbone=dict(attention="softmax"))
