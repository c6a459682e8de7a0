# What tools/convert.py makes of a checkpoint of the castling config: linear attention, nothing to anneal.
_base_ = "./gfl_castling-vit-nano_castling_score-pages.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
