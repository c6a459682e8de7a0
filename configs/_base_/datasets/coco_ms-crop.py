# COCO in its usual layout under data/coco/, multi-scale training with crops as in DETR and MViTv2: the short side 480
# to 800 pixels, half of the images after a crop; testing at 800.
_base_ = "mmdet::_base_/datasets/coco_detection.py"

# The largest batch, padded to multiples of 32: a landscape of 800 x 1333 beside a crop of 600 x 384 at its largest.
image_size = (1280, 1344)
short_sides = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
resize = dict(type="RandomChoiceResize", scales=[(side, 1333) for side in short_sides], keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [resize],
            [
                dict(type="RandomChoiceResize", scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=2, num_workers=4, dataset=dict(pipeline=train_pipeline))
