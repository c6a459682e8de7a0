_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "../_base_/datasets/scores.py",
    "../_base_/schedules/scores_1200it.py",
]

model = dict(
    # Crops have 576 tokens, whole sheets 4,800: normalizer="kernel" is an average at any number of tokens.
    backbone=dict(attention="softmax", attn_cfg=dict(normalizer="kernel"), img_size=192),
    # Notes are 10 to 13 pixels wide, clefs 80 high; notes of a chord lie 9 pixels apart or more, about a stride.
    bbox_head=dict(num_classes=12, anchor_generator=dict(octave_base_scale=2)),
    test_cfg=dict(nms=dict(iou_threshold=0.5), max_per_img=300),
)
