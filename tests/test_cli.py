"""The command `castling-det`: it finds scripts, host tools and configs, and ends in one line where it cannot."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from mmengine.config import Config

from castling_det import cli

SCRIPTS = [name for name, command in cli.COMMANDS.items() if command.script]


def test_starting_imports_nothing_heavy() -> None:
    code = (
        "import sys, castling_det.cli as c; c.main(['--help']); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "mmengine", "cv2", "mmdet"} & {*found.splitlines()[-1].split()}
    assert all(command.help in found and command.example in found for command in cli.COMMANDS.values())


@pytest.mark.parametrize("name", [*SCRIPTS, "train", "doctor", "config", "dist", "completion"])
def test_every_command_has_help(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", "castling_det", name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_every_example_is_of_its_command() -> None:
    for name, command in cli.COMMANDS.items():
        words = shlex.split(command.example)
        assert words[:2] == ["castling-det", name] or name in words[1], command.example


def test_a_wrong_command_is_refused_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["detct"]) == 2
    assert "no command 'detct'; did you mean detect?" in capsys.readouterr().err
    assert cli.main(["frobnicate"]) == 2
    assert "castling-det --help lists the commands" in capsys.readouterr().err


def test_configs_are_listed_printed_and_copied(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--list", "deploy_tree-crowns"]) == 0
    names = capsys.readouterr().out.split()
    assert "castling_vit/gfl_castling-vit-nano_deploy_tree-crowns.py" in names
    assert cli.main(["config", "gfl_castling-vit-nano_deploy_tree-crowns", "--out", str(tmp_path / "mine.py")]) == 0
    assert Config.fromfile(tmp_path / "mine.py").model.backbone.attention == "linear"
    assert cli.main(["config", "gfl_castling-vit-giant"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_names_of_our_configs_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    name = "castling_det::castling_vit/gfl_castling-vit-nano_deploy_tree-crowns.py"
    assert cli.main(["complexity", name]) == 0
    assert "one image of 192 x 192 pixels" in capsys.readouterr().out


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "castling_det.datasets.init", None)
    with pytest.raises(ImportError):  # nothing that a pip install would bring
        cli.main(["init", "data"])
    monkeypatch.setitem(sys.modules, "supervision", None)
    assert cli.main(["init", "data"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; pip install 'castling-det[video]'")
    monkeypatch.setattr(cli, "MIM", cli.MIM / "nothing")
    assert cli.main(["convert"]) == 1
    assert capsys.readouterr().err == "castling-det convert: convert.py is not in the wheel; run it in a clone\n"


def test_completion_is_taken_by_bash() -> None:
    command = [sys.executable, "-m", "castling_det", "completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, check=True)
    asked = "compgen -W \"$(complete -p castling-det | cut -d\\' -f2)\" con"
    done = subprocess.run(["bash", "-c", f"{script.stdout}\n{asked}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["config", "convert"]


def test_mmdetections_tools_take_names_of_our_configs(monkeypatch, tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys\nfrom pathlib import Path\nsys.exit(10 + Path(sys.argv[1]).is_file())\n")
    monkeypatch.setattr("castling_det.compat.host.mmdet_tool", lambda name: str(script))
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["train", "castling_det::castling_vit/gfl_castling-vit-nano_castling_tree-crowns.py"]) == 11
    assert cli.main(["test", "castling_det::castling_vit/nothing.py"]) == 10


def test_processes_of_a_distributed_training(monkeypatch) -> None:
    called = []
    done = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda command: called.append(command) or done)
    assert cli.main(["dist", "2", "train", "castling.py", "--amp"]) == 3
    (command,) = called
    assert "--nproc-per-node=2" in command and command[-4:] == ["castling.py", "--amp", "--launcher", "pytorch"]
