# SPDX-License-Identifier: Apache-2.0
"""Inference from a Hugging Face directory, with a class of Transformers' own and the quantized weights.

Code in the directory is never run. This needs Transformers, and no megatron-core.
"""

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import read_json
from ..ops import fake_quantize_activations
from ..quantization import quantize_dequantize
from ..quantization.record import QuantizerRecord, record_of_model
from .generate import NextToken
from .packed_model import check_model_files, load_packed_model

_LATENT = "bitcpm"
"""The model type of our latent exports, which are Granite models that compute with quantized weights."""
_ROW_PARALLEL = ("o_proj", "down_proj")
_FUSE = "python checkpoint_tools/qat_convert.py --input_bin {0} --output OUT writes one that needs no code of its own"
_CONVERT = "python checkpoint_tools/convert_hf_to_megatron.py --load-dir {0} --save-dir OUT writes one that opens here"


def open_transformers_model(directory: Path, device: torch.device, fp32: bool = False) -> Any:
    """Opens a directory of dense or packed weights as a model for inference.

    Latent weights are quantized once; the inputs of their layers are quantized to 8 bits in every forward pass if
    training did so. Fused weights are used as stock clients use them, with inputs that are not quantized.

    Args:
        directory: the directory with ``config.json`` and safetensors.
        device: the device to compute on.
        fp32: whether to compute in fp32, with the same weights; otherwise in their own dtype, or bf16 for packed ones.

    Raises:
        ValueError: if Transformers is not installed or has no class for the model, code of the directory would have to
            be run, files are missing or damaged, or the quantizer record does not fit; the message names the cure.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{directory} needs Transformers, which is not installed: pip install 'bitcpm_megatron[hf]'")
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{directory / 'config.json'}: expected a JSON object")
    if (packed := config.get("quantization_config")) is not None:
        return _packed(directory, packed, device, torch.float32 if fp32 else torch.bfloat16)
    _check_files(directory)
    record = record_of_model(directory)
    model = _built(directory, config, record, torch.float32 if fp32 else "auto")
    if record is not None and record.state == "latent":
        quantize_latents(model, record, directory)
    return model.requires_grad_(False).eval().to(device)


def _check_files(directory: Path) -> None:
    weights = [path.name for path in directory.glob("*.safetensors")]
    if not weights:
        raise ValueError(
            f"{directory} holds no *.safetensors: write the model anew with save_pretrained, for other formats of "
            "weights can hold code"
        )
    check_model_files(directory)


def _packed(directory: Path, quantization: Any, device: torch.device, dtype: torch.dtype) -> Any:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "compressed-tensors":
        raise ValueError(f"{directory}/config.json: weights packed by {method!r} are not read: compressed-tensors are")
    return load_packed_model(directory, device=device, dtype=dtype)


def _built(directory: Path, config: Mapping[str, Any], record: QuantizerRecord | None, dtype: Any) -> Any:
    """Loads the model with its weights as stored, in a class of Transformers' own."""
    from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
    from transformers.utils import logging as hf_logging

    kind, latent = config.get("model_type"), record is not None and record.state == "latent"
    options = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    ours = kind == _LATENT and latent
    if not ours and (config.get("auto_map") is not None or kind == _LATENT):
        cure = (_FUSE if latent else _CONVERT).format(directory)
        raise ValueError(f"{directory} is a {kind} model with code of its own, which is not run here: {cure}")
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        if ours:
            known = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
            granite = GraniteConfig.from_dict({**known, "architectures": ["GraniteForCausalLM"]})
            return GraniteForCausalLM.from_pretrained(directory, config=granite, **options)
        found = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(directory, config=found, trust_remote_code=False, **options)
    except Exception as error:  # Unexpected keys and values in a file raise errors of any type.
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{directory}: Transformers cannot open it as a causal language model: {said[0]}") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def quantize_latents(model: torch.nn.Module, record: QuantizerRecord, where: Path) -> None:
    """Replaces the latent weights of a model by their quantized ones, in place, and quantizes inputs if training did.

    Args:
        model: the model, whose modules have the names that the record lists.
        record: the record of the latent weights.
        where: the model's directory, for messages.

    Raises:
        ValueError: if the record does not fit the model.
    """
    modules = dict(model.named_modules())
    dtype = getattr(torch, record.latent_dtype)
    for name in record.modules:
        linear = modules.get(name)
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(f"{where}: its quantizer record lists {name}, which is no linear layer of the model")
        try:
            quantized, _ = quantize_dequantize(linear.weight.detach().to(dtype), record.config_of(name))
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
        with torch.no_grad():
            linear.weight.copy_(quantized)
        if record.activation_bits == 8:
            groups = record.row_parallel_shards if name.rpartition(".")[2] in _ROW_PARALLEL else 1
            linear.register_forward_pre_hook(functools.partial(_quantize_input, groups))


def _quantize_input(groups: int, module: torch.nn.Module, inputs: tuple) -> tuple:
    return (fake_quantize_activations(inputs[0], groups), *inputs[1:])


class TransformersNextToken(NextToken):
    """A Transformers model with ``DynamicCache`` as its cache.

    Args:
        model: a causal language model of Transformers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(original_length(model.config))
        self._model = model
        self._cache: Any = None
        takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if takes_keep else {}

    def _forward(self, tokens: list[int], kept: int) -> torch.Tensor:
        from transformers import DynamicCache

        if kept == 0 or self._cache is None:
            self._cache = DynamicCache()
        if beyond := self._cache.get_seq_length() - kept:
            self._cache.crop(-beyond)
        inputs = torch.tensor([tokens[kept:]], device=self._model.device)
        found = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True, **self._last)
        return found.logits[0, -1]


def original_length(config: Any) -> int | None:
    """Returns the length beyond which a LongRoPE uses its long factors; None for other rotary embeddings."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)
