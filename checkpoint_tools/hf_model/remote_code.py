# SPDX-License-Identifier: Apache-2.0
"""Model directories with a modeling file, for classes that Transformers does not have, and their quantizer record."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import FileError, write_text
from ...quantization.record import CONFIG_KEY, QuantizerRecord, RecordError, record_of_model
from ..storage.reader import ConversionError
from .config import BITCPM, CLASSES, MINICPM

MODELING_FILE = "modeling_bitcpm.py"


def write_remote_code(directory: str | Path, config: Mapping[str, Any], record: QuantizerRecord | None) -> None:
    """Writes ``config.json`` with an ``auto_map``, the modeling file that it points to, and the quantizer record.

    Args:
        directory: the model directory.
        config: the result of :func:`~.config.config_for` for ``bitcpm``, which needs a latent record, or for
            ``minicpm`` (ordinary or fused weights).
        record: the quantizer record with Hugging Face's module names, or None.

    Raises:
        ConversionError: if model type and record contradict each other.
    """
    kind = config.get("model_type")
    if kind not in (BITCPM, MINICPM):
        raise ConversionError(f"model type {kind!r} needs no modeling file: Transformers has it")
    if (kind == BITCPM) != (record is not None and record.state == "latent"):
        raise ConversionError(
            f"a {kind} export of {record.state if record else 'unrecorded'} weights: latent ones are exported as "
            f"{BITCPM}, and only they"
        )
    model = f"{MODELING_FILE.removesuffix('.py')}.{CLASSES[kind]}"
    names = {"AutoConfig": model.replace("ForCausalLM", "Config"), "AutoModelForCausalLM": model}
    written: dict[str, Any] = {**config, "auto_map": names}
    directory = Path(directory)
    if record is not None:
        record.write(directory)
        if kind == BITCPM:
            # The key is not `quantization_config`, for which Transformers would look for a quantizer of its own.
            written[CONFIG_KEY] = record.content()
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), directory / MODELING_FILE)
    write_text(directory / "config.json", json.dumps(written, indent=2) + "\n")


def read_record(directory: str | Path) -> QuantizerRecord | None:
    """Reads the quantizer record of a model directory from its file, its ``config.json`` or both; None if it has none.

    Raises:
        ConversionError: if a record cannot be understood, or the two contradict each other.
    """
    try:
        return record_of_model(directory)
    except RecordError as error:
        raise ConversionError(str(error)) from None
    except FileError:
        raise
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{directory}: the quantizer record is damaged ({error!r})") from None
