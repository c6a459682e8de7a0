"""The hooks of `castling_det.startup`, each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import castling_det

ROOT = Path(castling_det.__file__).parents[1]
HOOKS = "sum(hasattr(finder, 'castling_det_hook') for finder in sys.meta_path)"
WITHOUT_HOOKS = "sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, 'castling_det_hook')]"


def python(code: str, *flags: str, path: Path | None = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter, with the checkout on its path unless `path` is None."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # Where the package is installed its .pth has run already; each test starts without the hooks.
    command = [sys.executable, *flags, "-c", f"import sys\n{WITHOUT_HOOKS}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)


def answer(code: str) -> Any:
    """What `code` leaves in `result`, by way of JSON."""
    run = python(f"import json\n{code}\nprint(json.dumps(result))")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_public_names() -> None:
    assert castling_det.__all__ == ["Detector", "__version__", "check_dataset"]


def test_importing_is_light() -> None:
    loaded = answer("before = set(sys.modules); import castling_det; result = sorted(set(sys.modules) - before)")
    assert {"castling_det", "castling_det.startup"} <= set(loaded)
    assert not {name.partition(".")[0] for name in loaded} & {"torch", "numpy", "mmengine", "mmcv", "mmdet", "timm"}
    assert len(loaded) < 8, loaded


def test_the_hook_is_installed_once_however_often() -> None:
    code = f"""
from castling_det import startup
for _ in range(3): startup.install()
startup.at_interpreter_start()
gone = 'castling_det' not in sys.modules
import castling_det
result = [{HOOKS}, gone]"""
    assert answer(code) == [1, True]


@pytest.mark.parametrize(
    "order", ["import castling_det, mmengine.config.utils", "import mmengine.config.utils, castling_det"]
)
def test_configs_are_registered_whichever_is_imported_first(order: str) -> None:
    code = f"{order}\nresult = 'castling_det' in sys.modules['mmengine.config.utils'].MODULE2PACKAGE"
    assert answer(code) is True


@pytest.mark.parametrize("editable", [False, True])
def test_configs_lie_beside_the_metadata_or_where_python_finds_the_package(tmp_path: Path, editable: bool) -> None:
    """The second with OpenMMLab's mmengine too, which never asks Python where a distribution's module is."""
    metadata = tmp_path / "castling_det-0.1.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: castling-det\nVersion: 0.1.0\n")
    metadata.joinpath("top_level.txt").write_text("castling_det\n")
    if not editable:
        tmp_path.joinpath("castling_det").mkdir()
    code = f"""
import castling_det
sys.path.insert(0, {str(tmp_path)!r})
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import get_installed_path, is_installed
package = MODULE2PACKAGE['castling_det']
result = [is_installed(package), get_installed_path(package)]"""
    assert answer(code) == [True, str((ROOT if editable else tmp_path) / "castling_det")]


@pytest.fixture
def mmcv_like(tmp_path: Path) -> Path:
    """A package named mmcv, without operators."""
    package = tmp_path / "mmcv"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    return tmp_path


LOAD_OPERATORS = """
import castling_det
sys.path.insert(0, {path!r})
import mmcv._ext as ext
result = [ext.__spec__.origin, ext.nms.__module__]"""


def test_stand_in_where_there_are_no_compiled_operators(mmcv_like: Path) -> None:
    origin, module = answer(LOAD_OPERATORS.format(path=str(mmcv_like)))
    assert (origin, module) == ("castling_det.compat", "castling_det.compat.boxes")


def test_compiled_operators_win(mmcv_like: Path) -> None:
    compiled = mmcv_like / "mmcv" / "_ext.py"
    compiled.write_text("def nms(): pass\n", encoding="utf-8")
    code = LOAD_OPERATORS.format(path=str(mmcv_like)) + "\nresult.append('torch' in sys.modules)"
    assert answer(code) == [str(compiled), "mmcv._ext", False]


def test_broken_compiled_operators_are_not_papered_over(mmcv_like: Path) -> None:
    mmcv_like.joinpath("mmcv", "_ext.py").write_text("raise ImportError('undefined symbol')\n", encoding="utf-8")
    run = python(LOAD_OPERATORS.format(path=str(mmcv_like)))
    assert run.returncode != 0 and "undefined symbol" in run.stderr


def test_without_the_hooks_mmcv_has_no_operators(mmcv_like: Path) -> None:
    run = python(f"sys.path.insert(0, {str(mmcv_like)!r}); import mmcv._ext", "-S", path=None)
    assert run.returncode != 0 and "No module named 'mmcv._ext'" in run.stderr


def test_one_line_of_notice_once() -> None:
    run = python("import castling_det, mmcv.ops, mmdet.models, importlib; importlib.import_module('mmcv._ext')")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("mmcv has no compiled operators") == 1


def test_no_notice_from_workers_and_other_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from castling_det.compat import stand_in

    stand_in.announce()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.setenv("RANK", "1")
    stand_in.announce()
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(stand_in.multiprocessing, "parent_process", object)
    stand_in.announce()
    assert len(caplog.records) == 1


def test_the_pth_line_works_and_never_fails() -> None:
    lines = ROOT.joinpath("castling_det.pth").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and lines[0].startswith("import ")
    assert answer(f"exec({lines[0]!r}); result = {HOOKS}") == 1
    # Half uninstalled: the line is there, the package is not.
    gone = python(f"exec({lines[0]!r}); print({HOOKS})", "-S", path=None)
    assert (gone.returncode, gone.stdout, gone.stderr) == (0, "0\n", "")
