"""The study of accuracy at equal cost, docs/frontier.md. Goes on where it was interrupted.

Trainings, exports and mAP may share the machine with other work; `latency` must not.
"""

from __future__ import annotations

import sys

from experiments import Experiment, common_arguments
from steps import Step, StepFailed, run_steps

PRIMARY = (("castling", 1280), ("softmax", 640), ("castling", 896), ("softmax", 448), ("castling", 640))
# In the order in which they are trained.
SINGLE_SEED = (
    *(("softmax", 896), ("softmax-window", 1280), ("softmax-window", 896), ("castling", 448), ("softmax", 320)),
    *(("castling", 320), ("softmax-window", 640), ("linear", 1280), ("linear", 640)),
    *(("castling-progressive", 1280), ("castling-large-crops", 1280)),
)
RUNS = (
    *((attention, size, 0) for attention, size in (*PRIMARY, *SINGLE_SEED[:-4])),
    *((attention, size, seed) for seed in (1, 2) for attention, size in PRIMARY),
    *((attention, size, 0) for attention, size in SINGLE_SEED[-4:]),
)
LARGE_CROPS = {
    "train_dataloader.dataset.pipeline.3.crop_size": "(384,384)",
    "custom_hooks.2.end": "2304",  # tokens of a crop
}


def train(plan: Experiment, attention: str, size: int, seed: int) -> Step:
    """One detector for one size of page."""
    options = {"train_dataloader.dataset.pipeline.2.scale": f"({size},{size})"}
    if attention == "castling-large-crops":
        attention, options = "castling", options | LARGE_CROPS
        return plan.train(seed, f"castling-large-crops-{size}", plan.config(attention), options)
    return plan.train(seed, f"{attention}-{size}", plan.config(attention), options)


def main() -> int:
    """Runs the study; 0 when every step succeeded."""
    parser = common_arguments(__doc__, "work_dirs/frontier", [0, 1, 2])
    parser.set_defaults(data="score-pages")
    parser.add_argument("--trainings", action="store_true", help="stop after the trainings")
    args = parser.parse_args()
    plan = Experiment(args.work_dir, args.model, args.data, args.data_root)
    steps = [train(plan, *run) for run in RUNS if run[2] in args.seeds]
    try:
        plan.check("softmax", "castling")
        run_steps(steps, plan.work_dir, jobs=args.jobs)
    except (StepFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
