# A trained softmax detector becomes a linear one in a quarter of its iterations:
#   python tools/convert.py --from-softmax THIS_CONFIG SOFTMAX.pth START.pth
#   python .../mmdet/.mim/tools/train.py THIS_CONFIG --cfg-options load_from=START.pth
# With the whole softmax branch (threshold 0) at a share of 0.99 the first iterations train the softmax detector itself;
# the share falls in a straight line, and from 60% on linear attention is alone.
_base_ = "./gfl_castling-vit-nano_softmax_tree-crowns.py"

max_iters = 600
model = dict(backbone=dict(attention="castling", attn_cfg=dict(normalizer="kernel", center_keys=True, threshold=0.0)))
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=20, end=max_iters, T_max=max_iters - 20),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="castling_det.MaskAnnealingHook", schedule="constant", share=0.99, empty_from=0.6, interval=20),
]
