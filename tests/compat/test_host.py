"""The check of the host, on made-up sets of installed distributions."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError

import pytest

from castling_det.compat import host
from castling_det.compat.host import check_host, host_problems, host_warnings

ONEDL = {"onedl-mmengine": "0.10.12", "onedl-mmcv": "2.3.6", "onedl-mmdetection": "3.5.1"}
UPSTREAM = {"mmengine": "0.10.7", "mmcv-lite": "2.1.0", "mmdet": "3.3.0"}

Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes exactly these distributions the installed ones, and no module findable besides."""

    def pretend(distributions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(host, "version", version)
        monkeypatch.setattr(host, "find_spec", lambda name: None)

    return pretend


def test_the_host_of_this_environment_is_supported() -> None:
    check_host()


@pytest.mark.parametrize("distributions", [ONEDL, UPSTREAM, ONEDL | {"onedl-mmcv": "2.3.6rc1+cu130"}])
def test_supported(install: Install, distributions: dict[str, str]) -> None:
    install(distributions)
    check_host()


@pytest.mark.parametrize(
    ("distributions", "named"),
    [
        ({}, "mmengine is not installed; mmcv is not installed; mmdet is not installed"),
        ({key: ONEDL[key] for key in ("onedl-mmengine", "onedl-mmcv")}, "mmdet is not installed"),
        (ONEDL | {"onedl-mmdetection": "2.28.2"}, "onedl-mmdetection 2.28.2 is not supported, mmdet must be >= 3.3.0"),
        ({**UPSTREAM, "mmengine": "0.9.1"}, "mmengine 0.9.1 is not supported, mmengine must be >= 0.10.0"),
        ({"mmcv-full": "1.7.2", "mmengine": "0.10.7", "mmdet": "3.3.0"}, "mmcv-full 1.7.2 is not supported"),
        (UPSTREAM | {"mmcv-lite": "2.2.0"}, "mmdet 3.3.0 accepts mmcv below 2.2.0 only, and mmcv-lite 2.2.0"),
    ],
)
def test_unsupported(install: Install, distributions: dict[str, str], named: str) -> None:
    install(distributions)
    with pytest.raises(ImportError) as raised:
        check_host()
    assert named in str(raised.value)
    assert "pip install 'castling-det[onedl]'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_source_checkout_on_the_path_counts_as_installed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install({})
    monkeypatch.setattr(host, "find_spec", lambda name: object())
    assert host_problems() == []


@pytest.mark.parametrize(
    ("distributions", "named"),
    [
        (ONEDL | {"torch": "2.8.0"}, ""),
        (ONEDL | {"torch": "2.7.1+cpu"}, "torch 2.7.1+cpu cannot export detectors, to ONNX"),
        (ONEDL | {"torch": "2.14.1+cpu"}, ""),
        (ONEDL | {"torch": "2.5.1"}, "torch 2.5.1 cannot read checkpoints safely"),
        (UPSTREAM | {"torch": "2.5.1+cu124"}, "with torch >= 2.8"),
        (UPSTREAM | {"torch": "2.8.0"}, "mmengine 0.10.7 cannot load its own checkpoints on torch 2.8.0"),
        (UPSTREAM, ""),
    ],
)
def test_what_works_in_part_is_one_line_at_import(
    install: Install, caplog: pytest.LogCaptureFixture, distributions: dict[str, str], named: str
) -> None:
    install(distributions)
    check_host()
    assert len(host_warnings()) == len(caplog.records) == bool(named)
    if named:
        line = caplog.records[0].getMessage()
        assert named in line and "pip install" in line and "\n" not in line
