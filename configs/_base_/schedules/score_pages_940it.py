# 940 iterations from scratch, three crops of every page: six minutes of a CPU core, one recipe for every attention.
_base_ = "./tree_crowns_2400it.py"

max_iters = 940
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=40, end=max_iters, T_max=max_iters - 40),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 2))
