"""The whole job on a small data set: two trainings, conversion, tests, report. Goes on where it was interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import Experiment, common_arguments, last_checkpoint, run_experiment
from steps import Step

RUNS = ("softmax", "castling", "deploy")


def demo_steps(plan: Experiment, seeds: Sequence[int], max_iters: int | None = None) -> list[Step]:
    """Softmax and castling trained alike, castling converted, all three tested and compared."""
    options = {} if max_iters is None else {"train_cfg.max_iters": str(max_iters)}
    softmax, castling, deploy = map(plan.config, RUNS)
    last = last_checkpoint(castling, options)
    steps: list[Step] = []
    for seed in seeds:
        train_softmax = plan.train(seed, "softmax", softmax, options)
        train_castling = plan.train(seed, "castling", castling, options)
        weights, deployed = train_castling.folder / last, plan.folder(seed, "deploy") / "deploy.pth"
        convert = plan.convert(f"seed {seed}: convert", castling, weights, deployed, after=train_castling.done)
        steps += [
            *(train_softmax, train_castling, convert),
            plan.test(seed, "softmax", softmax, train_softmax.folder / last, after=train_softmax),
            plan.test(seed, "castling", castling, weights, after=train_castling),
            plan.test(seed, "deploy", deploy, deployed, after=convert),
        ]
    runs = [(name, plan.folder(seed, name)) for seed in seeds for name in RUNS]
    return [*steps, plan.report(runs, steps, baseline="softmax", deployed="deploy")]


def main() -> int:
    """Runs the demo; 0 when every step succeeded."""
    parser = common_arguments(__doc__, "work_dirs/demo", [0])
    parser.add_argument("--max-iters", type=int, help="iterations of each training, instead of the config's")
    args = parser.parse_args()
    plan = Experiment(args.work_dir, args.model, args.data, args.data_root)
    steps = lambda: demo_steps(plan, args.seeds, args.max_iters)  # noqa: E731
    return run_experiment(plan, RUNS[:2], steps, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
