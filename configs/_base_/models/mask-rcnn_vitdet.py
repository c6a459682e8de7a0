# Mask R-CNN as ViTDet has it, without a backbone: simple feature pyramid of five levels, two convolutions in the RPN,
# four and one linear layer in the box head, LayerNorm in box and mask head. A model adds `backbone` with one map of
# stride 16 and `neck.in_channels`.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

norm_cfg = dict(type="castling_det.LayerNorm2d", eps=1e-6)
model = dict(
    backbone=dict(_delete_=True, type="castling_det.CastlingViT", img_size=1024, drop_path_rate=0.1),
    neck=dict(
        _delete_=True,
        type="castling_det.SimpleFeaturePyramid",
        in_channels=384,
        in_stride=16,
        out_channels=256,
        out_strides=(4, 8, 16, 32, 64),
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
