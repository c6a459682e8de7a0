"""What the built pages need beyond Markdown: equations as MathML, a place for every page, links to other files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

from castling_det import __version__

ROOT = Path(__file__).resolve().parents[2]
_FENCED = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[^\S\n]*$", re.MULTILINE | re.DOTALL)
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Lets ```math blocks, which GitHub renders too, become MathML, and puts pages that `nav` lacks at its end.

    Browsers draw MathML without a script. The name of the site says which version its pages describe.
    """
    config["site_name"] += f" {__version__}"
    fence = {"name": "math", "class": "math", "format": _equation}
    config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", []).append(fence)
    if config["nav"]:
        listed = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
        missing = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md") if path.name not in listed)
        config["nav"] += [{"More": missing}] if missing else []
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns a link to a file of the repository that is no page into its path, once it is sure to exist."""

    def path_of(found: re.Match[str]) -> str:
        target = (ROOT / "docs" / page.file.src_uri).parent / found[2]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: link to {found[2]}: there is no such file in the repository")
        path = target.resolve().relative_to(ROOT).as_posix()
        return f"`{path}`" if found[1].strip("`") == path else f"{found[1]} (`{path}`)"

    pieces, end = [], 0
    for fence in _FENCED.finditer(markdown):
        pieces += [_OUTSIDE.sub(path_of, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _OUTSIDE.sub(path_of, markdown[end:])])


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source.strip(), display="block")}</div>'
