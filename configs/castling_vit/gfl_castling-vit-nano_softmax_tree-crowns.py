_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "../_base_/datasets/tree_crowns.py",
    "../_base_/schedules/tree_crowns_400it.py",
]

model = dict(backbone=dict(attention="softmax"), bbox_head=dict(num_classes=1))
