"""Uptraining on a small data set: trained softmax detectors become linear ones in a quarter of their iterations.

The softmax detectors come from `make study` (or tools/demo.py with --seeds). Goes on where it was interrupted; a
training begins anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import Experiment, common_arguments, last_checkpoint, run_experiment
from steps import Step


def uptraining_steps(
    plan: Experiment, teachers: str, seeds: Sequence[int], options: Mapping[str, str], *, distill: bool = False
) -> list[Step]:
    """Started from softmax, trained, converted, tested, and compared with the softmax detectors.

    Args:
        plan: with the configs `MODEL_{castling-from-softmax,deploy-from-softmax}_DATA.py`.
        teachers: work dir of a seed's softmax training, with `{seed}` in it; tested in `test/`.
        seeds: of the trainings.
        options: `--cfg-options` of the trainings.
        distill: learn from the frozen softmax detector as well, by the config `castling-from-softmax-distilled`.

    Raises:
        ValueError: a teacher's checkpoint or its test is missing; says how to get it.
    """
    from castling_det.report.work_dirs import find_checkpoint, read_test_metrics

    config = plan.config("castling-from-softmax" + ("-distilled" if distill else ""))
    steps: list[Step] = []
    runs = []
    for seed in seeds:
        folder = Path(teachers.format(seed=seed))
        teacher = find_checkpoint(folder)
        read_test_metrics(folder / "test")
        start = plan.folder(seed, "start") / "start.pth"
        deployed = plan.folder(seed, "deploy") / "deploy.pth"
        of_teacher = {"model.distillation.checkpoint": str(teacher)} if distill else {}
        begin = plan.convert(
            f"seed {seed}: start from softmax", config, teacher, start, "--from-softmax", after=teacher
        )
        train = plan.train(seed, "castling", config, of_teacher | dict(options), start=(begin, start))
        weights = train.folder / last_checkpoint(config, options)
        convert = plan.convert(f"seed {seed}: convert", config, weights, deployed, after=train.done)
        test = plan.test(seed, "deploy", plan.config("deploy-from-softmax"), deployed, after=convert)
        steps += [begin, train, convert, test]
        runs += [("softmax", folder), ("uptrained", test.folder.parent)]
    return [*steps, plan.report(runs, steps, baseline="softmax", deployed="uptrained")]


def main() -> int:
    """Runs the experiment; 0 when every step succeeded."""
    parser = common_arguments(__doc__, "work_dirs/uptraining", [0, 1, 2])
    parser.add_argument(
        "--teachers",
        default="work_dirs/study/seed{seed}/softmax",
        help="work dir of the softmax training of a seed, with its test in test/ (default: %(default)s)",
    )
    parser.add_argument("--distill", action="store_true", help="learn from the frozen softmax detector as well")
    parser.add_argument("--max-iters", type=int, help="iterations of each training, instead of the config's")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the training's config")
    args = parser.parse_args()
    plan = Experiment(args.work_dir, args.model, args.data, args.data_root)
    options = dict(option.split("=", 1) for option in args.option)
    if args.max_iters is not None:
        options["train_cfg.max_iters"] = str(args.max_iters)
    steps = lambda: uptraining_steps(plan, args.teachers, args.seeds, options, distill=args.distill)  # noqa: E731
    return run_experiment(plan, ("castling-from-softmax",), steps, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
