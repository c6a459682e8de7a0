_base_ = "./gfl_castling-vit-nano_softmax_tree-crowns.py"

model = dict(backbone=dict(attention="linear"))
