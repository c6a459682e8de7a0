# What tools/convert.py makes of a checkpoint of the castling config: linear attention, nothing to anneal.
_base_ = "./picodet_castling-levit-384_castling_8xb64-300e_coco.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
