# CastlingViT-nano: 4 blocks of width 64 at stride 8 behind a convolutional stem, simple feature pyramid, GFL head.
model = dict(
    type="GFL",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="castling_det.CastlingViT",
        embed_dims=64,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        stem="conv",
        attn_cfg=dict(local_conv_kernel_size=7),
        patch_size=8,
        img_size=256,
        drop_path_rate=0.05,
        init_cfg=None,
    ),
    neck=dict(
        type="castling_det.SimpleFeaturePyramid",
        in_channels=64,
        out_channels=64,
        in_stride=8,
        out_strides=(8, 16, 32),
    ),
    bbox_head=dict(
        type="GFLHead",
        num_classes=80,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=16),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32]
        ),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        reg_max=16,
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=100,
    ),
)
