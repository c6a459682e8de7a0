# What tools/convert.py makes of a checkpoint of the castling config: linear attention, nothing to anneal.
_base_ = "./picodet_castling-levit-128s_castling_tree-crowns.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
