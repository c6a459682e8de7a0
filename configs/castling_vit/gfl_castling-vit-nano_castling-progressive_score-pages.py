# Hybrid while small, linear when large: two epochs on crops of 192 pixels, in which the mask vanishes, and a third on
# crops of 384, four times the tokens at the price of linear attention. As many images as in the other trainings.
_base_ = "./gfl_castling-vit-nano_castling_score-pages.py"

large_crops = [*_base_.train_pipeline]
large_crops[3] = dict(type="RandomCrop", crop_size=(384, 384), allow_negative_crop=True)
train_dataloader = dict(sampler=dict(type="DefaultSampler", shuffle=True))
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=True))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="mmdet.PipelineSwitchHook", switch_epoch=2, switch_pipeline=large_crops),
]
