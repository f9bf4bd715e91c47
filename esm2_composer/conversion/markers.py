"""Markers: what a conversion has done, in files that also say whether it is still whole.

A marker is two lines: JSON, with the hashes of the files next to it that it vouches for, and the JSON's own hash.
So whatever is damaged or missing, the marker or such a file, counts as not done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from esm2_composer.files import write_durably, xxh64


def write_marker(path: Path, content: dict[str, Any], *files: Path) -> None:
    """Write `content` to `path`, and vouch for `files`, which are next to it and on disk already."""
    text = json.dumps({**content, "files": {file.name: xxh64(file) for file in files}}).encode()
    write_durably(path, b"%s\n%s\n" % (text, xxhash.xxh64_hexdigest(text).encode()))


def read_marker(path: Path) -> dict[str, Any] | None:
    """What it says; None if it, or a file that it vouches for, is damaged or missing."""
    try:
        text, _, own = path.read_bytes().partition(b"\n")
        if own != b"%s\n" % xxhash.xxh64_hexdigest(text).encode():
            return None
        content = json.loads(text)
        whole = all(xxh64(path.with_name(name)) == expected for name, expected in content["files"].items())
    except FileNotFoundError:
        return None
    return content if whole else None
