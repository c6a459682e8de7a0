# What tools/convert.py makes of a checkpoint of either castling-from-softmax config.
_base_ = "./gfl_castling-vit-nano_castling-from-softmax_tree-crowns.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
