# PicoDet on CastlingLeViT, trained in squares of 288 to 416 pixels, tested at 352. A model adds `backbone.arch`,
# `neck.in_channels`, and the width of neck and head where it is not 96.
_base_ = ["./models/picodet_csppan_pico-head.py", "./datasets/coco_picodet.py", "./schedules/picodet_300e.py"]

image_size = (416, 416)
test_size = (352, 352)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type="BatchSyncRandomResize", random_size_range=(288, 416), size_divisor=32, interval=1),
        ],
    ),
    backbone=dict(type="castling_det.CastlingLeViT", attention="softmax", init_cfg=None),
)
train_pipeline = _base_.train_pipeline
train_pipeline[3].scale = image_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = test_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
