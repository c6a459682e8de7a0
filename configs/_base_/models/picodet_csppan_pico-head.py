# PicoDet-S's neck and head (PaddleDetection, configs/picodet, legacy model with ESNet) without a backbone: a family
# adds `backbone` with maps of strides 8, 16, 32 and `neck.in_channels`. M: 128 channels, L: 160, both with
# stacked_convs=4.
model = dict(
    type="GFL",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        # A square size for each batch, the same on every GPU: 320 and two steps each way. Published for 416: 352 to
        # 480, for 640: 576 to 704. The pipeline gives the largest.
        batch_augments=[
            dict(type="BatchSyncRandomResize", random_size_range=(256, 384), size_divisor=32, interval=1),
        ],
    ),
    neck=dict(
        type="castling_det.CSPPAN",
        out_channels=96,
        num_outs=4,
        kernel_size=5,
        num_csp_blocks=1,
        norm_cfg=dict(type="BN"),
        act_cfg=dict(type="HSwish"),
    ),
    bbox_head=dict(
        type="castling_det.PicoHead",
        num_classes=80,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        kernel_size=5,
        share_cls_reg=True,
        strides=(8, 16, 32, 64),
        cell_offset=0.5,
        reg_max=7,
        norm_cfg=dict(type="BN"),
        act_cfg=dict(type="HSwish"),
        loss_cls=dict(
            type="VarifocalLoss", use_sigmoid=True, alpha=0.75, gamma=2.0, iou_weighted=True, loss_weight=1.0
        ),
        loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="castling_det.VarifocalSimOTAAssigner", center_radius=2.5, candidate_topk=10, iou_weight=6.0
        ),
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.025,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=100,
    ),
)
