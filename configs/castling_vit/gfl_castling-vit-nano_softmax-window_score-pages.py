# ViTDet's way to large images: softmax in windows of 14 tokens, the last of the four blocks over the whole page.
_base_ = "./gfl_castling-vit-nano_softmax_score-pages.py"

model = dict(backbone=dict(window_size=14, global_indices=(3,)))
