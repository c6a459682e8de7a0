_base_ = "./picodet_castling-levit-128_softmax_8xb64-300e_coco.py"

model = dict(backbone=dict(attention="linear"))
