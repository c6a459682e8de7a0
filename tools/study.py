"""The study of the attention's options: each trained alike over three seeds. Goes on where it was interrupted.

About ten minutes of one core for each run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from experiments import Experiment, common_arguments, last_checkpoint, run_experiment
from steps import Step

ATTENTION = "model.backbone.attn_cfg"
HOOK = "custom_hooks.2"
# The published block: 9 x 1 convolution along the raster, an absolute threshold of 0.02 that stays until the mask is
# emptied for good.
PUBLISHED = {
    f"{ATTENTION}.center_keys": "False",
    f"{ATTENTION}.local_conv": "tokens",
    f"{ATTENTION}.threshold_unit": "absolute",
    f"{ATTENTION}.threshold": "0.02",
    f"{HOOK}.schedule": "constant",
    f"{HOOK}.begin": "0",
    f"{HOOK}.end": "1.0",
}
UNIFORM = {f"{ATTENTION}.threshold_unit": "uniform", f"{ATTENTION}.threshold": "1.0", f"{HOOK}.end": "576"}
RAMP = {f"{HOOK}.begin": "0"}
# By row: the config that it starts from, and what is set otherwise, in the form of MMDetection's `--cfg-options`.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "softmax": ("softmax", {}),  # with the local convolution of the linear models
    "softmax-plain": ("softmax", {f"{ATTENTION}.local_conv": "None"}),  # a vanilla ViT
    "linear": ("linear", {}),  # from the start
    "published": ("castling", PUBLISHED),
    # One option of the published block changed in each.
    "kernel": ("castling", PUBLISHED | {f"{ATTENTION}.normalizer": "kernel"}),
    "center-keys": ("castling", PUBLISHED | {f"{ATTENTION}.center_keys": "True"}),
    "image-conv": ("castling", PUBLISHED | {f"{ATTENTION}.local_conv": "image"}),
    "uniform": ("castling", PUBLISHED | UNIFORM),
    "geometric": ("castling", PUBLISHED | {f"{HOOK}.schedule": "geometric"}),
    # Our options, with the threshold rising from the start; the last row is the config as it stands.
    "ramp": ("castling", RAMP),
    "ramp-centered": ("castling", RAMP | {f"{ATTENTION}.center_keys": "True"}),
    "castling": ("castling", {}),
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


def study_steps(
    plan: Experiment, variants: Sequence[str], seeds: Sequence[int], recipe: Mapping[str, str], baseline: str
) -> list[Step]:
    """Every variant trained and tested over seeds, and compared with the baseline.

    Hybrids are tested in eval mode, which is their deployed form: once the mask is empty, conversion changes no bit.
    """
    steps: list[Step] = []
    for seed in seeds:
        for name in variants:
            attention, changes = VARIANTS[name]
            config, options = plan.config(attention), {**recipe, **changes}
            train = plan.train(seed, name, config, options)
            of_model = {key: value for key, value in options.items() if key.startswith("model.")}
            weights = train.folder / last_checkpoint(config, options)
            steps += [train, plan.test(seed, name, config, weights, of_model, after=train)]
    runs = [(name, plan.folder(seed, name)) for seed in seeds for name in variants]
    return [*steps, plan.report(runs, steps, baseline=baseline, deployed=variants[-1])]


def main() -> int:
    """Runs the study; 0 when every step succeeded."""
    parser = common_arguments(__doc__, "work_dirs/options", [0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows (default: all)")
    parser.add_argument("--baseline", choices=VARIANTS, default="softmax", help="what the others are compared with")
    parser.add_argument(
        "--max-iters", type=int, default=1600, help="of every training, instead of the config's (default: 1600)"
    )
    args = parser.parse_args()
    plan = Experiment(args.work_dir, args.model, args.data, args.data_root)
    variants = [name for name in VARIANTS if name in {*args.variants, args.baseline}]
    steps = lambda: study_steps(plan, variants, args.seeds, recipe(args.max_iters), args.baseline)  # noqa: E731
    return run_experiment(plan, ("softmax", "castling"), steps, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
