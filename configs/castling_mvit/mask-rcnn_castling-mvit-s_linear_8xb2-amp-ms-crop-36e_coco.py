_base_ = "./mask-rcnn_castling-mvit-s_softmax_8xb2-amp-ms-crop-36e_coco.py"

model = dict(backbone=dict(attention="linear"))
