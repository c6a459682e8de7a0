_base_ = "./picodet_castling-levit-128s_softmax_tree-crowns.py"

model = dict(backbone=dict(attention="castling", attn_cfg=dict(threshold=1.0, threshold_unit="uniform")))
# end: tokens of a 192 x 192 image at stride 16, so that the ramp itself empties the mask.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="castling_det.MaskAnnealingHook", schedule="geometric", end=144, empty_from=0.7, interval=20),
]
