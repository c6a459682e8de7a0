_base_ = "./rtmdet_castling-levit-192_softmax_8xb32-300e_coco.py"

model = dict(backbone=dict(attention="linear"))
