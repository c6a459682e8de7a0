# COCO in its usual layout under data/coco/, PicoDet's augmentation at 320 pixels: crop by IoU, square resize that does
# not keep the ratio, flip, photometric distortion; no mosaic, no mixup. Testing at a fixed square.
# The size of each training batch is drawn in model.data_preprocessor; images come at the largest, so that it shrinks
# them. Published for 416: test_size 416, train_size 480, 40 images a GPU; for 640: 640, 704, 32.
_base_ = "mmdet::_base_/datasets/coco_detection.py"

train_size = (384, 384)
test_size = (320, 320)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="MinIoURandomCrop", min_ious=(0.1, 0.3, 0.5, 0.7, 0.9), min_crop_size=0.3),
    dict(type="Resize", scale=train_size, keep_ratio=False),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=test_size, keep_ratio=False, interpolation="bicubic"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
# Every image is a square: nothing to sort by aspect ratio.
train_dataloader = dict(batch_size=64, num_workers=8, batch_sampler=None, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
