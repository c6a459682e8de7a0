_base_ = "./dino-4scale_castling-vit-s_softmax_8xb2-12e_coco.py"

model = dict(backbone=dict(attention="linear"))
