# Trained in squares of 288 to 416 pixels, tested at 352.
_base_ = [
    "../_base_/models/picodet_csppan_pico-head.py",
    "../_base_/datasets/coco_picodet.py",
    "../_base_/schedules/picodet_300e.py",
]

image_size = (416, 416)
test_size = (352, 352)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type="BatchSyncRandomResize", random_size_range=(288, 416), size_divisor=32, interval=1),
        ],
    ),
    backbone=dict(type="castling_det.CastlingLeViT", arch="256", attention="softmax", init_cfg=None),
    neck=dict(in_channels=[128, 256, 384, 512], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128, stacked_convs=4),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = image_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = test_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
