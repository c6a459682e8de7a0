"""torch.export programs and AOTInductor packages: the checks of the ONNX file."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from castling_det.export import package
from castling_det.export.export import export_onnx
from castling_det.export.metadata import FileMetadata
from castling_det.export.package import export_package, load_package, read_metadata
from tests.export.test_export_onnx import arguments
from tools import export_pt2 as tool


@pytest.mark.parametrize(
    "kind",
    [
        "program",
        pytest.param(
            "aoti",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_a_package_gives_mmdetections_detections_at_sizes_it_was_not_traced_with(deployable, tmp_path, kind):
    config, checkpoint = deployable("gfl_vit")
    report = export_package(config, checkpoint, tmp_path / "tiny.pt2", kind=kind)
    assert len(report.parity) == 3 and all(result.detections for result in report.parity)
    assert read_metadata(report.path, kind=kind) == report.metadata
    assert isinstance(report.metadata, FileMetadata) and report.metadata.opset is None
    found = load_package(report.path, kind=kind)(np.zeros((1, 3, 32, 96), np.float32))
    assert found["boxes"].shape == (1, 30, 4)
    assert [path.name for path in tmp_path.glob("*.pt2*")] == ["tiny.pt2"]


def test_a_program_that_differs_is_not_written(deployable, tmp_path, monkeypatch):
    config, checkpoint = deployable("gfl_vit")
    load = package._runner

    def shifted(path, kind):
        run = load(path, kind)
        return lambda images: {name: value + (name == "scores") for name, value in run(images).items()}

    monkeypatch.setattr(package, "_runner", shifted)
    with pytest.raises(ValueError, match="differs from PyTorch beyond the tolerance"):
        export_package(config, checkpoint, tmp_path / "tiny.pt2", kind="program")
    assert not list(tmp_path.glob("*.pt2")) and not list(tmp_path.glob(".*"))


def test_a_compiler_that_fails_is_one_clear_error(deployable, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler\nwith a long trace")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails, raising=False)
    config, checkpoint = deployable("gfl_vit")
    with pytest.raises(ValueError, match=r"cannot compile the detector: no compiler; it needs a C\+\+ compiler"):
        export_package(config, checkpoint, tmp_path / "tiny.pt2", kind="aoti")
    assert not list(tmp_path.glob("*.pt2"))


@pytest.mark.parametrize(
    "more, message",
    [(["--kind", "program"], "expected a .pt2 file")],
)
def test_the_tool_refuses_in_one_line(deployable, tmp_path, capsys, more, message):
    assert tool.main([*arguments(tmp_path, *deployable("gfl_vit")), *more]) == 1
    line = capsys.readouterr().err
    assert message in line and line.startswith("export_pt2: ") and line.count("\n") == 1


def test_a_torch_whose_exporters_fail_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    message = r"^torch 2\.7\.1\+cpu cannot export detectors; install torch >= 2\.8$"
    with pytest.raises(ValueError, match=message):
        export_package("no.py", "no.pth", tmp_path / "x.pt2", kind="program")
    with pytest.raises(ValueError, match=message):
        export_onnx("no.py", "no.pth", tmp_path / "x.onnx")
