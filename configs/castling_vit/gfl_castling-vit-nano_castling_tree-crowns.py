_base_ = "./gfl_castling-vit-nano_softmax_tree-crowns.py"

model = dict(backbone=dict(attention="castling", attn_cfg=dict(threshold=1.0, threshold_unit="uniform")))
# begin: rows are close to uniform at the start, and a threshold that rises at once leaves nothing above it.
# end: tokens of a 192 x 192 image at stride 8, so that the ramp itself empties the mask.
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type="castling_det.MaskAnnealingHook", schedule="geometric", begin=0.4, end=576, empty_from=0.7, interval=20
    ),
]
