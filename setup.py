"""Puts `castling_det.pth` beside the package, in wheels and editable installs; the rest is in setup.cfg."""

from __future__ import annotations

# setuptools is imported before this file is run, and brings its own distutils.
from distutils.command.install_data import install_data as _InstallData

from setuptools import Distribution as _Distribution
from setuptools import setup


class Distribution(_Distribution):
    """Editable installs ask for `has_data`, which setuptools lacks, before they install data files."""

    def has_data(self) -> bool:
        return bool(self.data_files)


class InstallData(_InstallData):
    """Installs data files where the packages go: Python reads .pth files from there only."""

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"), ("root", "root"))
        self.force = True


setup(distclass=Distribution, cmdclass={"install_data": InstallData}, data_files=[("", ["castling_det.pth"])])
