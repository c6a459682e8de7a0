# Engraved scores on small sheets, prepared by tools/dataset_converters/scores.py --root data/scores_demo --paper 80 110
# --long-side 640 --splits train val --limit 400: notes of 10 to 13 pixels, trained on crops, tested on whole sheets.
dataset_type = "castling_det.CheckedCocoDataset"
data_root = "data/scores_demo/"
# What has enough boxes to be learned in minutes; sorted as the converter sorts.
classes = (
    "accidentalFlat",
    "accidentalNatural",
    "accidentalSharp",
    "cClef",
    "fClef",
    "flag8thDown",
    "flag8thUp",
    "gClef",
    "noteheadBlack",
    "noteheadHalf",
    "rest8th",
    "restQuarter",
)
metainfo = dict(classes=classes)
image_size = (192, 192)
sheet_size = (640, 640)

# No flips: a turned clef is no clef.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomCrop", crop_size=image_size, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4), keep_empty=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=sheet_size, keep_ratio=True),
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
    batch_size=1,
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
