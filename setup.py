"""Puts `castling_det.pth` beside the package, builds the same sdist twice, gives a release its addresses.

The rest is in setup.cfg.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile

# setuptools is imported before this file is run, and brings its own distutils.
from distutils.command.install_data import install_data as _InstallData
from pathlib import Path
from typing import Any

from setuptools import Distribution as _Distribution
from setuptools import setup
from setuptools.command.sdist import sdist as _Sdist


class Distribution(_Distribution):
    """Editable installs ask for `has_data`, which setuptools lacks, before they install data files."""

    def has_data(self) -> bool:
        return bool(self.data_files)


class InstallData(_InstallData):
    """Installs data files where the packages go: Python reads .pth files from there only."""

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"))
        self.force = True


class Sdist(_Sdist):
    """With SOURCE_DATE_EPOCH set, an archive of the content alone: sorted, one time, no owner. Wheels are so anyway."""

    def make_archive(  # type: ignore[no-untyped-def]  # as setuptools has it
        self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None
    ):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(epoch), 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = f"{base_name}.tar.gz"
        with (
            open(path, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for file in sorted((Path(base_dir), *Path(base_dir).rglob("*")), key=Path.as_posix):
                archive.add(file, recursive=False, filter=plain)
        return path


def addresses() -> dict[str, Any]:
    """With PROJECT_URL set, the repository's address on GitHub: the URLs of the metadata, and links in the README.

    A package index shows the README away from its repository: links to files lead to those of the release's tag.
    """
    address = os.environ.get("PROJECT_URL", "").rstrip("/")
    if not address:
        return {}
    (version,) = re.findall(r'(?m)^__version__ = "(.+)"$', Path("castling_det/__init__.py").read_text("utf-8"))

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({address}/{kind}/v{version}/{link['path']})"

    relative = r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)"
    return {
        "long_description": re.sub(relative, absolute, Path("README.md").read_text("utf-8")),
        "project_urls": {
            "Source": address,
            "Issues": f"{address}/issues",
            "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
        },
    }


setup(
    **addresses(),
    distclass=Distribution,
    cmdclass={"install_data": InstallData, "sdist": Sdist},
    data_files=[("", ["castling_det.pth"])],
)
