_base_ = "./gfl_castling-vit-s_softmax_8xb2-1x_coco.py"

model = dict(backbone=dict(attention="linear"))
