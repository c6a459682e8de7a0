# Engraved scores on whole pages, prepared by tools/dataset_converters/scores.py: 931 x 1280 pixels, 12 to a notehead.
# A detector is trained on crops of pages resized to `page_size`, and tested on whole pages of that size.
_base_ = "./scores.py"

data_root = "data/scores/"
page_size = (1280, 1280)  # longest sides; aspect ratio is kept
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=page_size, keep_ratio=True),
    dict(type="RandomCrop", crop_size=_base_.image_size, allow_negative_crop=True),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=page_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/val.json")
test_evaluator = val_evaluator
