# What tools/convert.py makes of a checkpoint of the castling config: linear attention, nothing to anneal.
_base_ = "./mask-rcnn_castling-vit-b_castling_8xb2-amp-lsj-100e_coco.py"

model = dict(backbone=dict(attention="linear"))
custom_hooks = []
