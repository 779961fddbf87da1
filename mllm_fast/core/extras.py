"""The command that installs an extra of the package, as it was installed itself."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_NAME = "mllm-fast"


def install_command(extra: str) -> str:
    """Return the command that installs an extra, for an error that says what is missing.

    Args:
        extra: A name of pyproject's optional dependencies, such as "serve".

    Returns:
        `pip install "mllm-fast[serve]"`; for a package that was installed from a folder, the same of that folder.
    """
    folder, editable = _source()
    if folder is None:
        return f'pip install "{_NAME}[{extra}]"'
    return f'pip install {"-e " if editable else ""}"{folder}[{extra}]"'


def _source() -> tuple[Path | None, bool]:
    """Return the folder that the package was installed from, None for an index, and whether it is editable."""
    try:
        text = distribution(_NAME).read_text("direct_url.json")
        origin = json.loads(text or "{}")
        url = urlsplit(origin.get("url", ""))
        folder = Path(url2pathname(url.path))
    except (PackageNotFoundError, OSError, ValueError, AttributeError):  # an installer may write anything, or nothing
        return None, False
    if url.scheme != "file" or not isinstance(origin.get("dir_info"), dict) or not folder.is_dir():
        return None, False
    return folder, bool(origin["dir_info"].get("editable"))
