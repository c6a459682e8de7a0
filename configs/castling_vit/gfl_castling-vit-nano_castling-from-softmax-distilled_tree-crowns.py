# As the config that it inherits, and the frozen softmax detector is the teacher of features, scores and boxes:
#   --cfg-options load_from=START.pth model.distillation.checkpoint=SOFTMAX.pth
_base_ = "./gfl_castling-vit-nano_castling-from-softmax_tree-crowns.py"

model = dict(
    type="castling_det.DistilledSingleStage", distillation=dict(checkpoint="", features=1.0, scores=1.0, boxes=1.0)
)
