# Aerial images with hand-drawn tree crowns, prepared by tools/dataset_converters/tree_crowns.py: tiles of 256 pixels,
# seen at 192. At three quarters of its size an image shows more trees in the same time, and each in its surroundings:
# trained for minutes from scratch, that is worth more than detail.
dataset_type = "castling_det.CheckedCocoDataset"
data_root = "data/tree_crowns/"
metainfo = dict(classes=("tree",), palette=[(46, 160, 67)])
image_size = (192, 192)

# Haze and exposure differ between the training image and the held-out one: equalised histograms bring them together.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Equalize", prob=1.0),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="RandomResize", scale=image_size, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type="RandomCrop", crop_size=image_size, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(9, 9), keep_empty=False),
    dict(type="PhotoMetricDistortion"),
    dict(type="Pad", size=image_size, pad_val=dict(img=(114, 114, 114))),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Equalize", prob=1.0),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/val.json", metric="bbox")
test_evaluator = val_evaluator
