# Trained in squares of 256 to 384 pixels, tested at 320.
_base_ = "../_base_/picodet_castling-levit_8xb64-300e_coco.py"

image_size = (384, 384)
test_size = (320, 320)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type="BatchSyncRandomResize", random_size_range=(256, 384), size_divisor=32, interval=1),
        ],
    ),
    backbone=dict(arch="384"),
    neck=dict(in_channels=[192, 384, 512, 768], out_channels=160),
    bbox_head=dict(in_channels=160, feat_channels=160, stacked_convs=4),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = image_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = test_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
