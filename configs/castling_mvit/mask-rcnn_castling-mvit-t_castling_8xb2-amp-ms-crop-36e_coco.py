_base_ = "./mask-rcnn_castling-mvit-t_softmax_8xb2-amp-ms-crop-36e_coco.py"

model = dict(backbone=dict(attention="castling", attn_cfg=dict(threshold=1.0, threshold_unit="uniform")))
# end: keys of a 1280 x 1344 image at stride 8, so that the ramp itself empties the mask.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="castling_det.MaskAnnealingHook", schedule="geometric", begin=0.4, empty_from=0.7),
]
