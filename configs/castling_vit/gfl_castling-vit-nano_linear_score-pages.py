_base_ = "./gfl_castling-vit-nano_softmax_score-pages.py"

model = dict(backbone=dict(attention="linear"))
