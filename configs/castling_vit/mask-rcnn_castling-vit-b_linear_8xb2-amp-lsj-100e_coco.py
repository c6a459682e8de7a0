_base_ = "./mask-rcnn_castling-vit-b_softmax_8xb2-amp-lsj-100e_coco.py"

model = dict(backbone=dict(attention="linear"))
