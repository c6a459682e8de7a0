# 2400 iterations instead of 1600: what starts with more parameters needs more of them.
_base_ = "./tree_crowns_1600it.py"

max_iters = 2400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=40, end=max_iters, T_max=max_iters - 40),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
