# What tools/convert.py makes of a checkpoint of the castling config: linear attention, nothing to anneal.
_base_ = "./gfl_castling-vit-s_castling_8xb2-1x_coco.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
