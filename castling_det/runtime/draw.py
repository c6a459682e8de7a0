"""Boxes drawn with OpenCV, for machines without MMDetection."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

from castling_det.runtime.detections import Detections, Image

__all__ = ["draw_detections"]


def draw_detections(image: Image, detections: Detections) -> Image:
    """A copy of the image with a box, a class name and a score for each detection, the best on top.

    Boxes that are small beside their text have none: a page of small objects would be all text. A class has one colour.
    """
    picture = np.ascontiguousarray(image).copy()
    thickness = max(1, round(max(picture.shape[:2]) / 800))
    font_scale = 0.4 * thickness
    for index in reversed(range(len(detections))):
        x1, y1, x2, y2 = (round(float(value)) for value in detections.boxes[index])
        label = int(detections.labels[index])
        hue = 0.33 + label / max(len(detections.classes), 1)
        color = [int(255 * value) for value in reversed(colorsys.hsv_to_rgb(hue, 0.7, 1.0))]
        cv2.rectangle(picture, (x1, y1), (x2, y2), color, thickness)
        text = f"{detections.classes[label]} {detections.scores[index]:.2f}"
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, font_scale, thickness)
        if width > 3 * (x2 - x1):
            continue
        top = max(y1 - height - base, 0)
        cv2.rectangle(picture, (x1, top), (x1 + width, top + height + base), color, cv2.FILLED)
        origin = (x1, top + height)
        cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, font_scale, (0, 0, 0), thickness, cv2.LINE_AA)
    return picture
