# SPDX-License-Identifier: Apache-2.0
"""Preflight checks of software: whether versions fit together (``launch/support.yaml``), and hosts know their flags."""

import contextlib
import fnmatch
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import read_yaml
from ..launcher.job import MEGATRON_LM, Job
from .subject import Finding, Subject, in_turn, judged, passed, warned

_MATRIX = Path(__file__).parents[1] / "support.yaml"
_PACKAGES = ("torch", "torch-npu", "megatron-core", "mindspeed", "numpy", "apex")
_CHECKOUTS = (
    ("megatron-core", "megatron_path", "megatron/core/package_info.py", r"^(?:MAJOR|MINOR|PATCH)\s*=\s*(\d+)"),
    ("mindspeed", "mindspeed_path", "setup.py", r"^__version__\s*=\s*['\"]([\w.]+)"),
)
_CANN_FILES = ("version.cfg", "ascend_toolkit_install.info", "version.info")


def versions(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the versions on this machine by package, without absent ones; checkouts named by the job come first."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for package, path, file, pattern in _CHECKOUTS:
        directory = getattr(job.host, path)
        parts = re.findall(pattern, _text(Path(directory) / file), re.MULTILINE) if directory is not None else []
        if parts:
            found[package] = ".".join(parts)
    cann = _cann(environ)
    if cann:
        found["cann"] = cann
    return found


def _versions(subject: Subject) -> list[Finding]:
    """Compares the versions on this machine with the support matrix."""
    found, device, matrix = versions(subject.job, subject.environ), subject.profile.device, read_yaml(_MATRIX)
    said = ", ".join(f"{package} {version}" for package, version in found.items())
    bad = [
        (entry["name"], entry["cure"])
        for entry in matrix["known-bad"]
        if device in entry.get("device", [device]) and _fits(entry["bad"], found)
    ]
    torch, npu = found.get("torch"), found.get("torch-npu")
    if torch and npu and torch.split(".")[:2] != npu.split(".")[:2]:
        bad.append((f"torch {torch} with torch_npu {npu}", "install the torch_npu built for this torch"))
    if bad:
        return judged("versions", "", bad)
    if device == "npu" and npu is None:
        what = f"no torch_npu here ({said})"
        return [warned("versions", what, "on a login node this is expected; docs/ascend.md installs it")]
    for row in matrix["rows"]:
        if device in row["device"] and _fits(row["needs"], found):
            verified = row.get("verified", "not verified by anybody we know of")
            return [passed("versions", f"{row['name']} ({verified}): {said}")]
    return [warned("versions", f"unknown combination: {said}", "launch/support.yaml lists the known ones")]


def _fits(patterns: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    return all(package in found and fnmatch.fnmatchcase(found[package], str(p)) for package, p in patterns.items())


def unknown_flags(job: Job) -> list[str]:
    """Returns the flags of the job whose names appear nowhere in the host's sources.

    A name counts as known wherever it occurs, with dashes or as an attribute: newer Megatron-LM makes its flags from
    the fields of dataclasses. If there are no sources, no flag is unknown.
    """
    checkouts = [(job.host.megatron_path, "megatron"), (job.host.mindspeed_path, "mindspeed")]
    text = "\n".join(_text(file) for path, inside in checkouts if path for file in (Path(path) / inside).rglob("*.py"))
    return [
        flag
        for flag in job.host.flags
        if text and not re.search(rf"--{re.escape(flag)}(?![\w-])|\b{re.escape(flag.replace('-', '_'))}\b", text)
    ]


def _host(subject: Subject) -> list[Finding]:
    host = subject.job.host
    if host.kind != MEGATRON_LM:
        # find_spec imports only the parent package of megatron.core.
        with contextlib.suppress(ImportError):
            if importlib.util.find_spec("megatron.core") is not None:
                return []
        cure = "pip install 'bitcpm_megatron[standalone]' on every node; on a login node this is expected"
        return [warned("host", "launch/pretrain.py needs megatron-core, which this Python does not have", cure)]
    wanted = [
        ("megatron-path", host.megatron_path, "pretrain_gpt.py"),
        ("mindspeed-path", host.mindspeed_path, "mindspeed/megatron_adaptor.py"),
    ]
    found = [
        (f"host.{key} {path} has no {file}", "give the checkout; every node needs it at this path")
        for key, path, file in wanted
        if path is not None and not (Path(path) / file).is_file()
    ]
    if not found:
        unknown = unknown_flags(subject.job)
        found = [(f"--{flag} appears nowhere in Megatron-LM or MindSpeed", "correct host.flags") for flag in unknown]
    return judged("host", f"{host.megatron_path}: knows all {len(host.flags)} host flags", found)


def _cann(environ: Mapping[str, str]) -> str | None:
    roots = [environ.get(name) for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")]
    roots += ["/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann"]
    for root in filter(None, roots):
        for name in _CANN_FILES:
            for file in [Path(root) / name, *sorted(Path(root).glob(f"*-linux/{name}"))]:
                match = re.search(r"(?im)^\s*version\s*=\s*\W?(\d[\w.]*)", _text(file))
                if match:
                    return match[1]
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


check = in_turn(_versions, _host)
