_base_ = "./gfl_castling-vit-nano_softmax_8xb16-100e_coco.py"

model = dict(backbone=dict(attention="linear"))
