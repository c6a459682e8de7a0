"""The study of the options on the tree crowns: each trained alike over three seeds. Goes on where it was interrupted.

The data comes from tools/dataset_converters/tree_crowns.py. About ten minutes of one core for each run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from castling_det.experiments import StepFailed, Study, Variant, run_steps, study_steps

ROOT = Path(__file__).resolve().parent.parent

# The published block: 9 x 1 convolution along the raster, an absolute threshold of 0.02 that stays until the mask is
# emptied for good. The rows after it change one option of it each; the last one is the config as it stands.
PUBLISHED = {
    "model.backbone.center_keys": "False",
    "model.backbone.local_conv": "tokens",
    "model.backbone.threshold_unit": "absolute",
    "model.backbone.threshold": "0.02",
    "custom_hooks.2.schedule": "constant",
    "custom_hooks.2.begin": "0",
    "custom_hooks.2.end": "1.0",
}
VARIANTS = {
    "softmax": Variant("softmax", {}, "softmax and the local convolution of the linear models"),
    "softmax-plain": Variant("softmax", {"model.backbone.local_conv": "None"}, "a vanilla ViT"),
    "linear": Variant("linear", {}, "linear from the start"),
    "published": Variant("castling", PUBLISHED, "castling with the published options"),
    "kernel": Variant("castling", {**PUBLISHED, "model.backbone.normalizer": "kernel"}, "normaliser"),
    "center-keys": Variant("castling", {**PUBLISHED, "model.backbone.center_keys": "True"}, "centred keys"),
    "image-conv": Variant("castling", {**PUBLISHED, "model.backbone.local_conv": "image"}, "local convolution"),
    "uniform": Variant(
        "castling",
        {
            **PUBLISHED,
            "model.backbone.threshold_unit": "uniform",
            "model.backbone.threshold": "1.0",
            "custom_hooks.2.end": "576",
        },
        "mask unit",
    ),
    "geometric": Variant("castling", {**PUBLISHED, "custom_hooks.2.schedule": "geometric"}, "schedule"),
    "ramp": Variant("castling", {"custom_hooks.2.begin": "0"}, "our options, the threshold rising from the start"),
    "ramp-centered": Variant(
        "castling",
        {"custom_hooks.2.begin": "0", "model.backbone.center_keys": "True"},
        "the same and centred keys",
    ),
    "castling": Variant("castling", {}, "castling with our options"),
}


def recipe(max_iters: int) -> dict[str, str]:
    """What the demo's recipe becomes in another number of iterations."""
    return {
        "max_iters": str(max_iters),
        "train_cfg.max_iters": str(max_iters),
        "train_cfg.val_interval": str(max_iters // 4),
        "param_scheduler.1.end": str(max_iters),
        "param_scheduler.1.T_max": str(max_iters - 40),
        "default_hooks.checkpoint.interval": str(max_iters // 4),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/options"), help="where everything is written")
    parser.add_argument("--data-root", type=Path, default=Path("data/tree_crowns"), help="where the data was prepared")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows (default: all)")
    parser.add_argument("--baseline", choices=VARIANTS, default="softmax", help="what the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each row (default: 0 1 2)")
    parser.add_argument(
        "--max-iters", type=int, default=1600, help="of every training, instead of the config's (default: 1600)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once, sharing the cores (default: 2)")
    return parser.parse_args()


def main() -> int:
    """Runs the study; 0 when every step succeeded."""
    args = parse_args()
    annotations = args.data_root / "annotations" / "val.json"
    study = Study(
        work_dir=args.work_dir,
        configs=ROOT / "configs" / "castling_vit",
        tools=ROOT / "tools",
        prefix="gfl_castling-vit-nano",
        suffix="tree-crowns",
        variants={
            name: replace(variant, options={**recipe(args.max_iters), **variant.options})
            for name, variant in VARIANTS.items()
            if name in {*args.variants, args.baseline}
        },
        baseline=args.baseline,
        train_annotations=annotations.with_name("train.json"),
        annotations=annotations,
        images=args.data_root / "val",
        seeds=args.seeds,
    )
    try:
        run_steps(study_steps(study), jobs=args.jobs)
    except StepFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((args.work_dir / "report" / "report.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
