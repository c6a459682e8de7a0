"""What is installed is what was tested: the lock file, licences, builds that repeat, the documents of trust."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

import castling_det
from tests.packaging.building import ROOT, copy_tree

LOCK = ROOT / "requirements" / "py311-linux-x86_64.lock"
TARGET = {"python_version": "3.11", "python_full_version": "3.11.7", "sys_platform": "linux"}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / "dev" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    """Version by name of a requirements file's exact pins, as they hold on the lock's platform."""
    lines = (line.strip() for line in ROOT.joinpath("requirements", name).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {
        normal(each.name): str(each.specifier).removeprefix("==")
        for each in found
        if each.specifier and (each.marker is None or each.marker.evaluate(TARGET))
    }


def test_the_lock_holds_what_the_pins_say() -> None:
    locked = {normal(name): version for name, version in tool("licences").locked(LOCK.read_text()).items()}
    wanted = pins("constraints.txt") | pins("default.txt")
    assert set(pins("default.txt")) <= set(locked), "run `make lock`"
    differing = {name: (wanted[name], locked[name]) for name in wanted.keys() & locked if wanted[name] != locked[name]}
    assert not differing, f"run `make lock`: {differing}"


def test_every_locked_package_has_hashes_and_no_address() -> None:
    text = LOCK.read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n\n")[2].strip())
    assert len(blocks) > 60
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", block) and re.search(r"--hash=sha256:[0-9a-f]{64}", block), block[:80]
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_licences_are_listed() -> None:
    text = ROOT.joinpath("docs", "licences.md").read_text(encoding="utf-8")
    for name, version in tool("licences").locked(LOCK.read_text()).items():
        assert re.search(rf"^\| {re.escape(name)} +\| +{re.escape(version)} \| ", text, re.MULTILINE), (
            f"{name} {version}: run `make licences`"
        )


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_two_builds_are_the_same_bytes(tmp_path: Path, kind: str) -> None:
    """From two copies whose files have other times; without SOURCE_DATE_EPOCH they differ."""
    build = tool("build_dist").build
    digests = []
    for number, epoch in enumerate(("1700000000", "1700000000", "1700000002")):
        target = tmp_path / str(number)
        target.mkdir()
        source = copy_tree(target / "source")
        for path in source.rglob("*"):
            if not path.is_symlink():
                os.utime(path, (10**9 + number * 1000, 10**9 + number * 1000))
        digests.append(hashlib.sha256(build(kind, source, target, epoch=epoch).read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_documents_of_trust() -> None:
    for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        assert ROOT.joinpath(name).stat().st_size > 500, name
    citation = yaml.safe_load(ROOT.joinpath("CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["version"] == castling_det.__version__
    assert citation["license"] == "Apache-2.0"


def test_workflows_run_what_a_developer_runs() -> None:
    """Every `make` target exists, every action has a version, no job may more than it says, all Pythons are tested."""
    targets = set(re.findall(r"^([a-z-]+):", ROOT.joinpath("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = set()
    for path in ROOT.joinpath(".github", "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                assert re.search(r"@(release/)?v\d+$", step.get("uses", "@v0")), step
                for line in re.findall(r"^make ([a-z -]+)$", step.get("run", ""), re.MULTILINE):
                    called |= set(line.split())
        if path.name == "ci.yml":
            pythons = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert {"lint", "test", "docs", "check-dist"} <= called <= targets
    classifiers = re.findall(r"Python :: (3\.\d+)", ROOT.joinpath("setup.cfg").read_text(encoding="utf-8"))
    assert pythons == classifiers
