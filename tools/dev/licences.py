"""Writes docs/licences.md: the licence of every package of the lock file, as the installed packages state it."""

from __future__ import annotations

import argparse
import re
import sys
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "py311-linux-x86_64.lock"
OUT = ROOT / "docs" / "licences.md"
HEAD = """\
# Licences of what is installed

castling_det is under the Apache-2.0 licence. These are the packages that `make setup` installs, with what their own
metadata states; written by `make licences` from `requirements/py311-linux-x86_64.lock`.

"""


def locked(text: str) -> dict[str, str]:
    """Version by name of each package in a lock file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", text, re.MULTILINE))


def stated_licence(found: Message) -> str:
    """The SPDX expression, else the classifiers, else the first line of the licence field."""
    if expression := found.get("License-Expression"):
        return str(expression)
    classified = [
        value.rpartition(" :: ")[2]
        for value in found.get_all("Classifier") or []
        if value.startswith("License ::") and value != "License :: OSI Approved"
    ]
    if classified:
        return ", ".join(classified)
    lines = [line.strip() for line in (found.get("License") or "").splitlines() if line.strip()]
    if any("Apache License" in line for line in lines[:6]):
        return "Apache-2.0"
    return lines[0] if lines else "not stated"


def main() -> int:
    """Writes the table; 1 if a package of the lock file is not installed in the locked version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    from castling_det.files import write_text
    from castling_det.report.render import markdown_table

    body, wrong = [], []
    for name, version in sorted(locked(LOCK.read_text(encoding="utf-8")).items(), key=lambda pair: pair[0].lower()):
        try:
            found = cast(Message, metadata(name))  # the type that it has
        except PackageNotFoundError:
            wrong.append(f"{name} {version} is not installed")
            continue
        if found["Version"] != version:
            wrong.append(f"{name} {version} is locked, {found['Version']} is installed")
        body.append([name, version, stated_licence(found)])
    if wrong:
        print(f"error: {'; '.join(wrong)}: run `make setup` on Python 3.11 first", file=sys.stderr)
        return 1
    write_text(OUT, HEAD + "\n".join(markdown_table(["package", "version", "licence"], body)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
