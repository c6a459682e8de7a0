_base_ = "./gfl_castling-vit-nano_softmax_scores.py"

model = dict(backbone=dict(attention="linear"))
