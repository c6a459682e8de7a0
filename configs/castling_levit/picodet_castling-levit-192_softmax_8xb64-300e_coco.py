_base_ = "../_base_/picodet_castling-levit_8xb64-300e_coco.py"

model = dict(
    backbone=dict(arch="192"),
    neck=dict(in_channels=[96, 192, 288, 384], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128, stacked_convs=4),
)
