# SPDX-License-Identifier: Apache-2.0
"""Model directories whose class Transformers does not have: ``config.json``, the modeling file, the record."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...files import FileError, write_text
from ...quantization.record import FILE_NAME, QuantizerRecord, RecordError
from ..storage.reader import ConversionError
from .config import BITCPM, MINICPM, read_config

CONFIG_KEY = "ternary_quantizer"
MODELING_FILE = "modeling_bitcpm.py"
_CONFIG_CLASSES = {BITCPM: "BitCPMConfig", MINICPM: "MiniCPMConfig"}
_MODEL_CLASSES = {BITCPM: "BitCPMForCausalLM", MINICPM: "MiniCPMForCausalLM"}


def write_remote_code(directory: str | Path, config: Mapping[str, Any], record: QuantizerRecord | None) -> None:
    """Writes ``config.json`` with an ``auto_map``, the modeling file that it points to, and the quantizer record.

    Args:
        directory: of the export; it exists.
        config: as :func:`~.config.config_for` makes it for ``bitcpm`` (latent weights) or ``minicpm`` (ordinary or
            fused ones).
        record: by Hugging Face's module names; ``bitcpm`` needs a latent one.

    Raises:
        ConversionError: model type and record do not go together.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_CLASSES:
        raise ConversionError(f"model type {kind!r} needs no modeling file: Transformers has it")
    if (kind == BITCPM) != (record is not None and record.state == "latent"):
        raise ConversionError(
            f"a {kind} export of {record.state if record else 'unrecorded'} weights: latent ones are exported as "
            f"{BITCPM}, and only they"
        )
    module = MODELING_FILE.removesuffix(".py")
    written = {
        **config,
        "auto_map": {
            "AutoConfig": f"{module}.{_CONFIG_CLASSES[kind]}",
            "AutoModelForCausalLM": f"{module}.{_MODEL_CLASSES[kind]}",
        },
    }
    directory = Path(directory)
    if kind == BITCPM and record is not None:
        # Not `quantization_config`: Transformers would look for a quantizer of its own.
        written[CONFIG_KEY] = asdict(record)
    if record is not None:
        record.write(directory)
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), directory / MODELING_FILE)
    write_text(directory / "config.json", json.dumps(written, indent=2) + "\n")


def read_record(directory: str | Path) -> QuantizerRecord | None:
    """The quantizer record of a model directory, from its file, its ``config.json``, or both; None where there is none.

    Raises:
        ConversionError: one cannot be understood, or the two contradict each other.
    """
    try:
        in_file = QuantizerRecord.read(directory)
        in_config = None
        if (Path(directory) / "config.json").is_file():
            in_config = _of_config(read_config(directory), directory)
        if in_file is None or in_config is None:
            return in_file or in_config
        lines = in_file.contradictions(in_config)
    except RecordError as error:
        raise ConversionError(str(error)) from None
    except FileError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConversionError(f"{directory}: the quantizer record is damaged ({error!r})") from None
    if lines:
        listed = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
        raise ConversionError(
            f"{directory}: {FILE_NAME} (here: the checkpoint) and config.json (here: asked for) contradict each other: "
            f"{listed}. Trainers rewrite config.json: delete {FILE_NAME} if it is left over from an earlier model"
        )
    return in_config


def _of_config(config: Mapping[str, Any], directory: str | Path) -> QuantizerRecord | None:
    content = config.get(CONFIG_KEY)
    if content is None:
        return None
    return QuantizerRecord.from_mapping(content, f"{directory}/config.json: {CONFIG_KEY}")
