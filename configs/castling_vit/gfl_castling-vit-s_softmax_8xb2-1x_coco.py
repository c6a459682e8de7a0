# RetinaNet's 12 epochs with a neck and a head of 96 channels instead of 256: where RetinaNet's head costs what the
# backbone does, this one leaves the attention to decide the latency.
_base_ = [
    "../_base_/models/gfl_castling-vit-nano.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/custom_imports.py",
]

# The largest training image, 800 x 1333, padded to multiples of 32.
image_size = (800, 1344)
strides = (8, 16, 32, 64, 128)
model = dict(
    backbone=dict(_delete_=True, type="castling_det.CastlingViT", attention="softmax", drop_path_rate=0.1),
    neck=dict(in_channels=384, in_stride=16, out_channels=96, out_strides=strides),
    bbox_head=dict(in_channels=96, feat_channels=96, anchor_generator=dict(strides=list(strides))),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
custom_hooks = [dict(type="castling_det.ClassCountHook")]
