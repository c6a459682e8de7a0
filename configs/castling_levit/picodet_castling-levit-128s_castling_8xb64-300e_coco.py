_base_ = "./picodet_castling-levit-128s_softmax_8xb64-300e_coco.py"

model = dict(backbone=dict(attention="castling", attn_cfg=dict(threshold=1.0, threshold_unit="uniform")))
# end: tokens of a 352 x 352 image at stride 16, so that the ramp itself empties the mask.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="castling_det.MaskAnnealingHook", schedule="geometric", begin=0.4, empty_from=0.7),
]
