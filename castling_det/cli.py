"""The command `castling-det`: our tools and MMDetection's `train.py` and `test.py` by name. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from castling_det import __version__

__all__ = ["main"]

MIM = Path(__file__).resolve().parent / ".mim"
"""Configs and tools, installed beside the package as OpenMMLab's packages have them."""


EXTRAS = {
    "runtime": ("cv2", "msgspec", "onnxruntime"),
    "video": ("supervision",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "test": ("doit",),
    "onedl": (
        *("torch", "torchvision", "timm", "safetensors", "mmengine", "mmcv", "mmdet"),
        *("msgspec", "PIL", "matplotlib", "jinja2", "rich", "faster_coco_eval"),
    ),
}
"""Modules that an extra brings, as far as commands need them."""


class Command(NamedTuple):
    """One word after `castling-det`."""

    help: str
    example: str
    script: str | None = None
    """Of tools/; None: of this file."""
    extra: str = "onedl"
    """What of `pip install "castling-det[...]"` it needs."""


COMMANDS = {
    "doctor": Command("print what is installed, what works and what to do", "castling-det doctor"),
    "config": Command("list, print or copy the configs", "castling-det config --list tree-crowns"),
    "init": Command(
        "write configs for a data set of yours", "castling-det init data/mine --out mine", extra="onedl,video"
    ),
    "check": Command("check data and a config before a training", "castling-det check castling.py", "check_dataset.py"),
    "train": Command("train, by MMDetection's train.py", "castling-det train castling.py"),
    "test": Command("evaluate, by MMDetection's test.py", "castling-det test deploy.py deploy.pth"),
    "dist": Command("train or test on several GPUs", "castling-det dist 8 train castling.py --amp"),
    "convert": Command(
        "make the linear checkpoint of a hybrid one",
        "castling-det convert castling.py work_dirs/castling/iter_2400.pth deploy.pth",
        "convert.py",
    ),
    "export": Command(
        "write an ONNX file", "castling-det export deploy.py deploy.pth deploy.onnx", "export_onnx.py", "onedl,export"
    ),
    "detect": Command(
        "find objects in images, folders and videos",
        "castling-det detect deploy.onnx photos/ --out found",
        "detect.py",
        "runtime",
    ),
    "report": Command(
        "compare trained detectors on one page",
        "castling-det report --run softmax=work_dirs/softmax --run castling=work_dirs/castling --out report",
        "report.py",
    ),
    "attention": Command(
        "draw where a layer looks",
        "castling-det attention deploy.py deploy.pth photo.jpg --point 120 80 --out attention.png",
        "attention.py",
    ),
    "complexity": Command("count parameters and multiply-adds", "castling-det complexity deploy.py", "complexity.py"),
    "benchmark": Command(
        "time the attentions, in a clone", "castling-det benchmark --levels core --sizes 16 32", "benchmark.py"
    ),
    "uptrain": Command(
        "make trained softmax detectors linear, in a clone",
        "castling-det uptrain --distill",
        "uptrain.py",
        "onedl,test",
    ),
    "completion": Command("print the shell's completion", 'eval "$(castling-det completion bash)"'),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"castling-det {__version__}")
        return 0
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "castling-det --help lists the commands"
        print(f"castling-det: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        if command.script is not None:
            return _run(MIM / "tools" / command.script, name, rest)
        return {
            "doctor": _doctor,
            "config": _config,
            "init": _init,
            "train": _host_tool,
            "test": _host_tool,
            "dist": _distributed,
            "completion": _completion,
        }[name](name, rest)
    except ImportError as error:
        missing = [extra for extra in command.extra.split(",") if not all(map(find_spec, EXTRAS[extra]))]
        if not missing:
            raise  # a fault of an installed package, or of the user's own module: it needs its traceback
        hint = "" if "pip install" in str(error) else f"; pip install 'castling-det[{','.join(missing)}]'"
        print(f"castling-det {name}: {error}{hint}", file=sys.stderr)
        return 1


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {one.help}\n  {'':{width}}    {one.example}" for name, one in COMMANDS.items()]
    return "\n".join(["usage: castling-det COMMAND ...  (castling-det COMMAND --help says more)", "", *lines])


def _run(script: Path | str, name: str, arguments: Sequence[str]) -> int:
    """Runs a script as Python does, under the command's name."""
    import runpy

    script = Path(script)
    if not script.is_file():
        print(f"castling-det {name}: {script.name} is not in the wheel; run it in a clone", file=sys.stderr)
        return 1
    sys.argv = [f"castling-det {name}", *arguments]
    sys.path.insert(0, str(script.parent.resolve()))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"castling-det {name}", description=COMMANDS[name].help)


def _doctor(name: str, arguments: Sequence[str]) -> int:
    parser = _parser(name)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(arguments)
    from castling_det.doctor import run_doctor

    return run_doctor(as_json=args.json)


def _config(name: str, arguments: Sequence[str]) -> int:
    parser = _parser(name)
    parser.add_argument("config", nargs="?", help="name of a config, or a part of names with --list; a file's path")
    parser.add_argument("--list", action="store_true", help="print the names, to be written after castling_det::")
    parser.add_argument("--out", type=Path, help="write it there, with all its bases resolved, instead of printing it")
    args = parser.parse_args(arguments)
    folder = MIM / "configs"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("[!_]*/*.py"))
    if args.list or not args.config:
        found = [one for one in names if (args.config or "") in one]
        print("\n".join(found))
        return int(not found)
    from castling_det.config import load_config
    from castling_det.files import write_text

    known = [one for one in names if args.config in (one, Path(one).stem, Path(one).name)]
    try:
        text = load_config(f"castling_det::{known[0]}" if known else args.config).pretty_text
    except ValueError as error:
        print(f"castling-det {name}: {error}; castling-det config --list names ours", file=sys.stderr)
        return 1
    if args.out is None:
        print(text)
    else:
        write_text(args.out, text)
    return 0


def _init(name: str, arguments: Sequence[str]) -> int:
    from castling_det.datasets.init import main as init

    return init(arguments)


def _host_tool(name: str, arguments: Sequence[str]) -> int:
    from castling_det.compat.host import mmdet_tool

    return _run(mmdet_tool(f"{name}.py"), name, _found(arguments))


def _found(arguments: Sequence[str]) -> list[str]:
    """Paths instead of `castling_det::` names, which MMDetection's tools take in `_base_` only."""
    prefix = "castling_det::"
    return [str(MIM / "configs" / one.removeprefix(prefix)) if one.startswith(prefix) else one for one in arguments]


def _distributed(name: str, arguments: Sequence[str]) -> int:
    parser = _parser(name)
    parser.add_argument("gpus", type=int, help="processes, one for each GPU")
    parser.add_argument("command", choices=("train", "test"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args(arguments)
    import subprocess

    from castling_det.compat.host import mmdet_tool

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}"]
    command = [*launcher, mmdet_tool(f"{args.command}.py"), *_found(args.arguments), "--launcher", "pytorch"]
    return subprocess.run(command).returncode


def _completion(name: str, arguments: Sequence[str]) -> int:
    parser = _parser(name)
    parser.add_argument("shell", choices=("bash", "zsh"))
    args = parser.parse_args(arguments)
    if args.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(f"complete -o default -W '{' '.join(COMMANDS)}' castling-det")
    return 0


if __name__ == "__main__":
    sys.exit(main())
