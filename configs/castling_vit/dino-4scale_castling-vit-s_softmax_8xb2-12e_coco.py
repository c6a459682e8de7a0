# DINO, 4 scales, 12 epochs, on the levels of a simple feature pyramid.
_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../_base_/custom_imports.py"]

# The largest batch, padded: a landscape of 800 x 1333 beside a crop of 600 x 384 at its largest.
image_size = (1280, 1344)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True, type="castling_det.CastlingViT", attention="softmax", drop_path_rate=0.1),
    neck=dict(
        _delete_=True,
        type="castling_det.SimpleFeaturePyramid",
        in_channels=384,
        in_stride=16,
        out_channels=256,
        out_strides=(8, 16, 32, 64),
    ),
)
custom_hooks = [dict(type="castling_det.ClassCountHook")]
