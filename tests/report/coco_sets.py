"""Random annotations and detections of several categories, with every trap of COCO's evaluation in them."""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def random_set(seed: int, *, images: int = 9, categories: int = 3, ties: bool = True) -> tuple[dict[str, Any], Rows]:
    """Boxes of all sizes, crowds, images without boxes, one with 120 detections, a category without annotations.

    With `ties`, scores are tenths, so that many are equal, in one image and across images.
    """
    random = np.random.default_rng(seed)
    document: dict[str, Any] = {
        "images": [{"id": 7 * i + 3, "file_name": f"{i}.png", "height": 300, "width": 300} for i in range(images)],
        "categories": [{"id": 2 * c + 1, "name": f"kind {c}"} for c in range(categories)],
        "annotations": [],
    }
    results: Rows = []
    for i, image in enumerate(document["images"]):
        for _ in range(0 if i == 2 else 5):
            box = [*random.uniform(0, 150, 2).tolist(), *random.uniform(8, 140, 2).tolist()]
            category = 1 + 2 * int(random.integers(0, categories - 1))
            document["annotations"].append({
                "id": len(document["annotations"]) + 1, "image_id": image["id"], "category_id": category, "bbox": box,
                "area": box[2] * box[3] * 0.8, "iscrowd": int(random.random() < 0.15),
            })  # fmt: skip
            for _ in range(int(random.integers(0, 3))):
                moved = (np.array(box) + random.uniform(-12, 12, 4)).clip(1).tolist()
                results.append(_row(image["id"], category, moved, random, ties))
        for _ in range(115 if i == 4 else 4):
            box = [*random.uniform(0, 200, 2).tolist(), *random.uniform(5, 90, 2).tolist()]
            results.append(_row(image["id"], 1 + 2 * int(random.integers(0, categories)), box, random, ties))
    return document, results


def _row(image: int, category: int, box: list[float], random: np.random.Generator, ties: bool) -> dict[str, Any]:
    score = float(random.random())
    return {"image_id": image, "category_id": category, "bbox": box, "score": round(score, 1) if ties else score}


def repeated(document: dict[str, Any], results: Rows, counts: list[int]) -> tuple[dict[str, Any], Rows]:
    """The set in which each image is there `counts` times, copies under names of their own, in the images' order."""
    images: Rows = []
    annotations: Rows = []
    boxes: Rows = []
    for image, count in zip(sorted(document["images"], key=lambda image: image["id"]), counts, strict=True):
        for _ in range(count):
            new = {"image_id": len(images) + 1}
            images.append({**image, "id": new["image_id"]})
            annotations += [row | new for row in document["annotations"] if row["image_id"] == image["id"]]
            boxes += [row | new for row in results if row["image_id"] == image["id"]]
    annotations = [row | {"id": number} for number, row in enumerate(annotations, start=1)]
    return {**document, "images": images, "annotations": annotations}, boxes
