# RTMDet with CSPNeXt-m's neck and head. LeViT's pre-training, unlike CSPNeXt's, has RGB images.
_base_ = ["mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py", "../_base_/custom_imports.py"]

image_size = (640, 640)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32
    ),
    backbone=dict(
        _delete_=True,
        type="castling_det.CastlingLeViT",
        arch="384",
        attention="softmax",
        img_size=640,
        out_indices=(0, 1, 2),
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[192, 384, 512]),
)
custom_hooks = [dict(type="castling_det.ClassCountHook"), *_base_.custom_hooks]
# RTMDet's rate belongs to its 8 GPUs of 32 images; MMDetection's base file says 16.
auto_scale_lr = dict(base_batch_size=256)
