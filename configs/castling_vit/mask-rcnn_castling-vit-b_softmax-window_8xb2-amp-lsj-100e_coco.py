# ViTDet's own attention, the second softmax baseline: windows of 14 x 14 tokens, 4 of 12 blocks over the whole map.
_base_ = "./mask-rcnn_castling-vit-b_softmax_8xb2-amp-lsj-100e_coco.py"

model = dict(backbone=dict(window_size=14, global_indices=(2, 5, 8, 11), attn_cfg=dict(local_conv=None)))
