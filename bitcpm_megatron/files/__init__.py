# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401  # these names are for the other floors
"""Floor 0: files that appear completely or not at all, digests that show damage, and readers that trust no input."""

from .atomic import (
    FileError,
    directory_mistake,
    disk_is_full,
    fsync,
    incomplete,
    is_inside,
    publish,
    read_text,
    replacing,
    require_file,
    write_text,
)
from .digests import (
    DIGESTS,
    Digester,
    DigestError,
    add_digest,
    check_digests,
    digest,
    find_damage,
    read_digests,
    write_digests,
)
from .documents import Strict, nearest, parse_json, parse_yaml, read_json, read_yaml, validated
