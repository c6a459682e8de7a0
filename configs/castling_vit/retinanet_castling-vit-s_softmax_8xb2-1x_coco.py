# RetinaNet, 12 epochs: the row that papers on backbones share. AdamW at 1e-4, as MMDetection's PVT.
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "../_base_/custom_imports.py"]

# The largest training image, 800 x 1333, padded to multiples of 32.
image_size = (800, 1344)
model = dict(
    backbone=dict(_delete_=True, type="castling_det.CastlingViT", attention="softmax", drop_path_rate=0.1),
    neck=dict(
        _delete_=True,
        type="castling_det.SimpleFeaturePyramid",
        in_channels=384,
        in_stride=16,
        out_channels=256,
        out_strides=(8, 16, 32, 64, 128),
    ),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
custom_hooks = [dict(type="castling_det.ClassCountHook")]
