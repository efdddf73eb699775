# SPDX-License-Identifier: Apache-2.0
"""The layout of the package; everything else is in pyproject.toml.

``patches/``, ``launch/`` and ``checkpoint_tools/`` are at the top of the checkout and are installed inside the package,
so that no generic name appears in site-packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INSIDE = ("patches", "launch", "checkpoint_tools")

version = re.search(r'^__version__ = "(.+)"$', (ROOT / "bitcpm_megatron" / "__init__.py").read_text(), re.MULTILINE)

setup(
    version=version.group(1),
    packages=[
        *find_packages(include=["bitcpm_megatron", "bitcpm_megatron.*"]),
        *(f"bitcpm_megatron.{room}" for room in find_packages(include=[f"{name}*" for name in INSIDE])),
    ],
    package_data={
        "bitcpm_megatron": ["py.typed"],
        "bitcpm_megatron.inference.kernels": ["*.c"],
        "bitcpm_megatron.ops.cpu": ["*.c", "*.h"],
        "bitcpm_megatron.launch": [
            *(f"{folder}/*.yaml" for folder in ("models", "jobs", "environments", "sweeps")),
            "support.yaml",
        ],
    },
    package_dir={f"bitcpm_megatron.{name}": name for name in INSIDE},
)
