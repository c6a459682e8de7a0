"""A COCO data set for MMDetection that says what is wrong with its annotations before training starts."""

from __future__ import annotations

import logging
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from ..registry import DATASETS
from .checks import check_annotation_file, raise_for_problems

__all__ = ["CheckedCocoDataset"]


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """`mmdet.CocoDataset` with the checks of `castling_det.datasets.checks` in front of its loader.

    Errors raise one ValueError with the field and the fix of each; warnings go to the log. `check_files=False` skips
    the look for missing image files, `backend_args` (files elsewhere than on a local disk) does so, too. With
    `test_mode` a file without annotations passes. Images without boxes are trained on as background unless `filter_cfg`
    says `filter_empty_gt=True`.
    """

    def __init__(self, *args: Any, check_files: bool = True, **kwargs: Any) -> None:
        self.check_files = check_files  # first: the base class loads the annotations in its constructor
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Checks the annotation file, then loads it as `mmdet.CocoDataset` does."""
        local_images = self.check_files and self.backend_args is None
        with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            problems = check_annotation_file(
                path,
                classes=self.metainfo.get("classes"),
                image_root=self.data_prefix.get("img", "") if local_images else None,
                need_boxes=not self.test_mode,
            )
        for problem in problems:
            if problem.severity == "warning":
                print_log(f"{self.ann_file}: {problem}", logger="current", level=logging.WARNING)
        raise_for_problems(problems, source=self.ann_file)
        return super().load_data_list()  # type: ignore[no-any-return]
