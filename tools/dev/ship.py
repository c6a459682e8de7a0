"""Makes a detector that comes with the package: `ship.py NAME CONFIG CHECKPOINT SIZE ANNOTATIONS IMAGES`.

Writes castling_det/weights/NAME.onnx in float16 for images of SIZE pixels, and NAME.json beside it, its card, with the
mAP of that very file on the annotated images. docs/model_zoo.md names both.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from castling_det.export.onnx import export_onnx  # noqa: E402
from castling_det.files import sha256_of, write_json  # noqa: E402
from castling_det.runtime.detector import WEIGHTS  # noqa: E402
from tools.benchmarks.equal_cost import draws, predict, sized  # noqa: E402


def main(name: str, config: str, checkpoint: str, size: str, annotations: str, images: str) -> int:
    """Returns the exit code."""
    path = WEIGHTS / f"{name}.onnx"
    path.parent.mkdir(exist_ok=True)
    report = export_onnx(sized(config, int(size)), checkpoint, path, precision="float16")
    document = json.loads(Path(annotations).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        boxes, found = Path(scratch, "boxes.json"), Path(scratch, "map.npz")
        predict(path, Path(annotations), Path(images), boxes)
        draws(Path(annotations), boxes, found, report.metadata.classes)
        measured = np.load(found)
        values, map50 = measured["values"], float(measured["map50"])
    card = {
        "name": name,
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "task": f"symbols of engraved music on whole pages, resized to a longest side of {size} pixels",
        "classes": report.metadata.classes,
        "map": round(float(values[0]), 4),
        "map50": round(map50, 4),
        "measured_on": f"{len(document['images'])} pages of collections not trained on; see docs/frontier.md",
        "trained_on": "1,253 engraved pages, 940 iterations of 4 crops (docs/scores.md); engravings of public works",
        "not_for": "handwriting, photographs of pages, symbols other than these",
        "config": Path(config).name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "licence": "Apache-2.0",
    }
    write_json(path.with_suffix(".json"), card)
    print(json.dumps(card, indent=2))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
