# Trained in squares of 224 to 352 pixels, tested at 288.
_base_ = "../_base_/picodet_castling-levit_8xb64-300e_coco.py"

image_size = (352, 352)
test_size = (288, 288)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type="BatchSyncRandomResize", random_size_range=(224, 352), size_divisor=32, interval=1),
        ],
    ),
    backbone=dict(arch="128S"),
    neck=dict(in_channels=[64, 128, 256, 384]),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = image_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = test_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
