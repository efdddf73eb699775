# SPDX-License-Identifier: Apache-2.0
"""Floor 0: files that are there whole or not at all, digests that show damage, and readers that believe nothing."""

from .atomic import (
    FileError,
    directory_mistake,
    disk_is_full,
    fsync,
    is_inside,
    publish,
    read_text,
    require_file,
    write_text,
)
from .digests import (
    DIGESTS,
    DigestError,
    add_digest,
    check_digests,
    digest,
    find_damage,
    read_digests,
    write_digests,
)
from .documents import Strict, nearest, parse_json, parse_yaml, read_json, read_yaml, validated

__all__ = [
    "DIGESTS",
    "DigestError",
    "FileError",
    "Strict",
    "add_digest",
    "check_digests",
    "digest",
    "directory_mistake",
    "disk_is_full",
    "find_damage",
    "fsync",
    "is_inside",
    "nearest",
    "parse_json",
    "parse_yaml",
    "publish",
    "read_digests",
    "read_json",
    "read_text",
    "read_yaml",
    "require_file",
    "validated",
    "write_digests",
    "write_text",
]
