_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "../_base_/datasets/score_pages.py",
    "../_base_/schedules/score_pages_940it.py",
]

model = dict(
    # Crops have 576 tokens, whole pages up to 19,200: normalizer="kernel" is an average at any number of tokens.
    backbone=dict(attention="softmax", attn_cfg=dict(normalizer="kernel"), img_size=192),
    # Notes are 3 to 12 pixels wide, by the size of the page: a level at stride 4 reaches them.
    neck=dict(out_strides=(4, 8)),
    bbox_head=dict(num_classes=12, anchor_generator=dict(octave_base_scale=2, strides=[4, 8]), stacked_convs=1),
    # A page holds up to some 800 symbols.
    test_cfg=dict(nms_pre=2000, nms=dict(iou_threshold=0.5), max_per_img=1000),
)
