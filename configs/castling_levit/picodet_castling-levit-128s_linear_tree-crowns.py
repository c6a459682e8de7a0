_base_ = "./picodet_castling-levit-128s_softmax_tree-crowns.py"

model = dict(backbone=dict(attention="linear"))
