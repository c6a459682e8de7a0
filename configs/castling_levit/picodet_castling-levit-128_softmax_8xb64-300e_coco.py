_base_ = "../_base_/picodet_castling-levit_8xb64-300e_coco.py"

model = dict(
    backbone=dict(arch="128"),
    neck=dict(in_channels=[64, 128, 256, 384]),
)
