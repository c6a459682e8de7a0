"""`castling-det doctor`: its lines, its exit code, and what it says about a broken environment."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from castling_det import doctor
from castling_det.cli import main
from castling_det.doctor import Finding


def check(name: str) -> Finding:
    return next(finding for finding in doctor.examine() if finding.name == name)


def test_every_check_answers_in_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["doctor", "--json"])
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(findings) == [name for name, _ in doctor.CHECKS]
    # Whether the package is installed, and not only on the path, is not this test's affair.
    own = {name: entry["status"] for name, entry in findings.items() if name not in ("start-up", "configs")}
    assert "problem" not in own.values(), findings
    assert exit_code == int(any(entry["status"] == "problem" for entry in findings.values()))
    assert all(entry["advice"] for entry in findings.values() if entry["status"] != "ok")
    assert findings["host"]["detail"].count("mm") >= 3


@pytest.mark.parametrize(("status", "exit_code"), [("warning", 0), ("problem", 1)])
def test_exit_code_and_text(
    status: str, exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def thing() -> str:
        raise doctor.Trouble("seen", "do this", status)

    monkeypatch.setattr(doctor, "CHECKS", (("thing", thing),))
    assert main(["doctor"]) == exit_code
    assert capsys.readouterr().out.splitlines() == [f"{status:<8} thing  seen", f"{'':<16}-> do this"]


def test_a_check_that_fails_is_a_problem_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernels() -> str:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    def missing() -> str:
        raise ModuleNotFoundError("No module named 'mmdet'", name="mmdet.models")

    monkeypatch.setattr(doctor, "CHECKS", (("a", no_kernels), ("b", missing), ("c", doctor._python)))
    first, second, third = doctor.examine()
    assert (first.status, second.status, third.status) == ("problem", "problem", "ok")
    assert first.detail == "RuntimeError: operator torchvision::nms does not exist"
    assert "different builds" in first.advice
    assert "provides mmdet" in second.advice and "castling-det[onedl]" in second.advice


def test_two_distributions_of_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.host, "installed_distributions", lambda package: [(name, package.minimum) for name in ("one", "two")]
    )
    assert check("host").status == "problem" and "uninstall both" in check("host").advice


def test_what_works_in_part_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.host, "host_warnings", lambda: ["half of it; do this"])
    assert check("host").status == "warning" and check("host").advice == "half of it; do this"


def test_compiled_operators_are_told_from_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmcv.ops  # noqa: F401  # so that the check's own import finds it loaded

    compiled = SimpleNamespace(__spec__=SimpleNamespace(origin="/x/_ext.so"), __file__="/x/_ext.so")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)  # type: ignore[arg-type]
    assert check("operators") == Finding("operators", "ok", "compiled, /x/_ext.so")


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 4096)
    assert check("devices").status == "warning" and "OMP_NUM_THREADS" in check("devices").advice


def test_usage_errors() -> None:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--nonsense"])
    assert raised.value.code == 2
