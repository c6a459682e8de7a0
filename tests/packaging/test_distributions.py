"""What the wheel, the sdist and the editable install carry."""

from __future__ import annotations

import re
import stat
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.packaging.building import ROOT, build, create_environment


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def dist_info(files: dict[str, bytes], name: str) -> str:
    (found,) = [path for path in files if path.endswith(f".dist-info/{name}")]
    return files[found].decode()


def files_below(folder: Path, *suffixes: str) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes}
    assert found, f"nothing in {folder}"
    return found


def test_wheel_carries_every_module_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    modules = {f"castling_det/{name}" for name in files_below(ROOT / "castling_det", ".py") if ".mim" not in name}
    carried = {name for name in files if name.endswith(".py") and "/.mim/" not in name}
    assert carried == modules
    tops = {name.partition("/")[0] for name in files}
    assert len(tops) == 3 and {"castling_det", "castling_det.pth"} < tops
    assert "castling_det/py.typed" in files


def test_configs_and_tools_travel_as_files(wheel: Path) -> None:
    files = contents(wheel)
    for name in files_below(ROOT / "configs", ".py", ".yml"):
        assert files[f"castling_det/.mim/configs/{name}"] == ROOT.joinpath("configs", name).read_bytes()
    # What needs a clone stays out: experiments, data converters, benchmarks, scripts of maintainers.
    tools = {Path(name).name for name in files if name.startswith("castling_det/.mim/tools/")}
    users = ("attention", "check_dataset", "complexity", "convert", "detect", "export_onnx", "report")
    assert tools == {f"{name}.py" for name in users}
    for name in tools:
        assert files[f"castling_det/.mim/tools/{name}"] == ROOT.joinpath("tools", name).read_bytes()
    assert files["castling_det/.mim/model-index.yml"] == ROOT.joinpath("model-index.yml").read_bytes()


def test_the_hook_is_beside_the_package_and_on_record(wheel: Path) -> None:
    files = contents(wheel)
    assert files["castling_det.pth"] == ROOT.joinpath("castling_det.pth").read_bytes()
    assert dist_info(files, "RECORD").count("castling_det.pth,sha256=") == 1


def test_metadata(wheel: Path) -> None:
    files = contents(wheel)
    metadata = Parser().parsestr(dist_info(files, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("castling-det", "0.1.0")
    assert metadata["License"] == "Apache-2.0" and "Apache License" in dist_info(files, "licenses/LICENSE")
    assert {part.strip() for part in metadata["Requires-Python"].split(",")} == {">=3.10", "<3.13"}
    required = metadata.get_all("Requires-Dist") or []
    unconditional = [line for line in required if "extra ==" not in line]
    hosts = [line for line in unconditional if line.removeprefix("onedl-").startswith("mm")]
    assert unconditional and not hosts, "the host is the user's choice"
    assert {"onedl", "upstream", "runtime", "video", "test"} <= set(metadata.get_all("Provides-Extra") or [])
    assert "castling-det = castling_det.cli:main" in dist_info(files, "entry_points.txt")


def test_a_release_links_to_its_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a package index: every link of the README is an address, and those to our files name files."""
    monkeypatch.setenv("PROJECT_URL", "https://example.org/a/b/")
    metadata = dist_info(contents(build("wheel", source, tmp_path)), "METADATA")
    assert "Project-URL: Source, https://example.org/a/b\n" in metadata
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", metadata)
    assert all(re.match(r"https?://|#", address) for _, address in links)
    ours = [re.match(r"https://example.org/a/b/(raw|blob)/v0.1.0/([^#]+)", address) for _, address in links]
    assert sum(map(bool, ours)) > 5
    for (picture, _), found in zip(links, ours, strict=True):
        assert not found or ((ROOT / found[2]).is_file() and found[1] == ("raw" if picture else "blob")), found


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() for member in archive)
        archive.extractall(tmp_path)
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    assert contents(again).keys() == contents(wheel).keys()


def test_editable_install_has_the_hook_and_uninstalls_it(source: Path, tmp_path: Path) -> None:
    environment = create_environment(tmp_path / "venv")
    environment.install(build("editable", source, tmp_path))
    assert environment.site_packages.joinpath("castling_det.pth").exists()
    assert not environment.site_packages.joinpath("castling_det").exists()
    environment.pip("uninstall", "--quiet", "--yes", "castling-det")
    assert {path.name for path in environment.site_packages.iterdir()} - {"__pycache__"} == {"zz_host.pth"}
