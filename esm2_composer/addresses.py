"""Where data may be: paths, and addresses of stores."""

from __future__ import annotations

import os
import re
from pathlib import PurePath


def is_remote(uri: str) -> bool:
    """Whether it is the address of a store: s3://bucket/prefix, or dbfs:/Volumes/..."""
    return re.match(r"[\w+-]+:/", uri) is not None


def names_bucket(uri: str) -> bool:
    """Whether a store's address says where in it, if the store has buckets: s3://, s3:///x and s3:/x do not."""
    return not re.match(r"(s3|gs|oci|azure|azure-dl|hf|sftp):(?!//[^/])", uri)


def lies_in(place: str, folder: str) -> bool:
    """Whether it is the folder, or something in it, on a disk or in a store."""
    place, folder = (each if is_remote(each) else os.path.realpath(each) for each in (place, folder))
    return PurePath(place).is_relative_to(folder)
