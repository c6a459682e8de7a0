"""One build and one installation for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.building import Environment, build, copy_tree, create_environment


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "castling_det")


@pytest.fixture(scope="package")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="package")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = create_environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.install(wheel)
    return environment
