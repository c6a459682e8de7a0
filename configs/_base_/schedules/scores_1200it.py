# 1200 iterations from scratch, minutes on two CPU cores: the recipe of the demo on scores, one for every attention.
_base_ = "./tree_crowns_2400it.py"

max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=40, end=max_iters, T_max=max_iters - 40),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 2))
