# SPDX-License-Identifier: Apache-2.0
"""Tests of packed exports in llama.cpp: ``make test-clients`` builds llama.cpp and runs them.

Logits are compared only for F32 and BF16 files: with packed weights, llama.cpp computes with 8-bit activations, whose
rounding separates it from Transformers. Packed weights are compared by decoding them.
"""

import ctypes
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.chat import CHATML, chat_tokenizer
from support.texts import strings

pytest.importorskip("llama_cpp", reason="builds llama.cpp in minutes: make test-clients")

import gguf
import llama_cpp
import transformers
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from support.packed import Tensors, architecture, latent_model, open_gguf, write_config, write_sentence_piece

from bitcpm_megatron.checkpoint_tools import export_packed
from bitcpm_megatron.checkpoint_tools.packed import gguf_file
from bitcpm_megatron.launch.launcher.presets import architecture as architecture_of
from bitcpm_megatron.models.architecture import Architecture, LongRope

# llama.cpp rounds the length of a context up to a multiple of ORIGINAL, and chooses the long factors by this length.
ORIGINAL, LENGTH = 256, 512
MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=1.4 / math.sqrt(2), logits_scaling=4.0)
_NO_TYPE = 0  # GGML_TYPE_F32, the type of cached keys and values
MODELS = Path(os.environ.get("CHAT_TEMPLATES_PATH", "nowhere"))
TOLERANCE = {"F32": 1e-4, "BF16": 1e-2}
"""Bounds relative to the largest logit. In BF16, another order of sums rounds some inputs of linears differently."""


def model(kind: str, longrope: bool) -> Architecture:
    """Returns a Llama or a Granite; LongRoPE's two lists of factors are far from 1 and from each other."""
    factors = [tuple(1 + k + n * (0.1 + 0.1 * k) for n in range(32)) for k in (0, 1)]
    rope = LongRope(*factors, original_max_position_embeddings=ORIGINAL) if longrope else None
    more = MULTIPLIERS if kind == "granite" else {}
    return architecture(max_position_embeddings=LENGTH, longrope=rope, tied=kind == "granite", **more)


def exported(directory: Path, *more: str) -> Path:
    """Exports a model as a GGUF file, and returns its path."""
    out = directory.with_name("-".join(["out", *more]))
    argv = ["--load-dir", str(directory), "--save-dir", str(out), "--format", "gguf", *more]
    assert export_packed.main(argv) == 0
    return out / "model.gguf"


def opened(path: Path, length: int = ORIGINAL) -> "llama_cpp.Llama":
    return llama_cpp.Llama(
        str(path), n_ctx=length, n_batch=length, logits_all=True, type_k=_NO_TYPE, type_v=_NO_TYPE, verbose=False
    )


def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Rounds inputs as llama.cpp does before it multiplies them with BF16 weights (``ggml_vec_dot_bf16``)."""
    return (inputs[0].bfloat16().float(),)


def logits_of_transformers(
    directory: Path, a: Architecture, weights: Tensors, tokens: list[int], types: str
) -> torch.Tensor:
    """Returns fp32 logits of the unpacked weights; for a BF16 file, inputs of linears are rounded as in llama.cpp."""
    if not directory.exists():
        directory.mkdir()
        held = {name: tensor.float() for name, tensor in weights.items()}
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
        write_config(directory, a, torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    for module in loaded.modules():
        if types == "BF16" and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    with torch.no_grad():
        return loaded(torch.tensor([tokens])).logits[0]


def logits_of_llama_cpp(path: Path, tokens: list[int], length: int) -> torch.Tensor:
    loaded = opened(path, length)
    loaded.eval(tokens)
    return torch.from_numpy(loaded.scores[: len(tokens)].copy())


def sequence(length: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("longrope", [False, True], ids=["rope", "longrope"])
@pytest.mark.parametrize("kind", ["llama", "granite"])
@pytest.mark.parametrize("types", ["F32", "BF16"])
@pytest.mark.verifies(
    "checkpoints",
    "llama.cpp computes the same logits from GGUF exports in F32 and BF16 as Transformers from the same weights "
    "(1e-4 and 1e-2 of the largest), and tokenizes texts to the same ids (`make test-clients`)",
    cuda="-",
    npu="-",
)
def test_logits_are_those_of_transformers(types: str, kind: str, longrope: bool, tmp_path: Path, monkeypatch) -> None:
    a = model(kind, longrope)
    weights = latent_model(tmp_path / "model", a)
    write_sentence_piece(tmp_path / "model")
    arguments = ("--linear-type", types, "--embedding-type", types)
    path = exported(tmp_path / "model", *arguments)
    for count, context in ((200, ORIGINAL), (400, LENGTH)):
        tokens = sequence(count)
        expected = logits_of_transformers(tmp_path / "dense", a, weights, tokens, types)
        found = logits_of_llama_cpp(path, tokens, context)
        assert float(expected.std()) > 0.1
        difference = float((found - expected).abs().max() / expected.abs().max())
        print(f"{kind} {types} {count} tokens: {difference:.2e} of the largest logit")
        assert difference < TOLERANCE[types]
    if longrope:
        monkeypatch.setattr(gguf_file, "_FACTORS", {})
        shutil.rmtree(path.parent)
        exported(tmp_path / "model", *arguments)
        without = logits_of_llama_cpp(path, tokens, LENGTH)
        lost = float((without - expected).abs().max() / expected.abs().max())
        print(f"{kind} {types} without factors: {lost:.2e} of the largest logit")
        assert lost > 5 * TOLERANCE[types], "the comparison would not see lost factors"


@pytest.mark.parametrize(
    ("group", "kind"), [(-1, "TQ2_0"), (-1, "TQ1_0"), (-1, "Q2_0"), (64, "Q2_0"), (128, "Q2_0"), (32, "Q4_0")]
)
def test_llama_cpp_decodes_the_weights_of_the_training_forward(group: int, kind: str, tmp_path: Path) -> None:
    weights = latent_model(tmp_path / "model", architecture(), group)
    write_sentence_piece(tmp_path / "model")
    path = exported(tmp_path / "model", "--linear-type", kind)
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    decode = getattr(library, f"dequantize_row_{kind.lower()}")
    decode.argtypes, decode.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    compared = 0
    for tensor in open_gguf(path).tensors:
        names = {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}
        parts = tensor.name.split(".")
        if len(parts) < 3 or parts[2] not in names:
            continue
        expected = weights[f"model.layers.{parts[1]}.{names[parts[2]]}.weight"].float()
        data, found = tensor.data.copy(), torch.empty_like(expected)
        decode(data.ctypes.data, found.data_ptr(), found.numel())
        assert torch.equal(found, expected), tensor.name
        compared += 1
    assert compared == 6
    # A model with these weights also loads and computes.
    logits = logits_of_llama_cpp(path, sequence(20), ORIGINAL)
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.1


def test_ids_of_a_sentencepiece_model(tmp_path: Path) -> None:
    latent_model(tmp_path / "model", architecture())
    write_sentence_piece(tmp_path / "model")
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    loaded, texts = opened(exported(tmp_path / "model")), strings(1000)
    different = [t for t in texts if loaded.tokenize(t.encode(), add_bos=False, special=False) != theirs.encode(t)]
    assert not different, f"{len(different)} of 1000, such as {different[:3]!r}"
    assert len({i for t in texts for i in theirs.encode(t)}) > 100, "strings that use the vocabulary"
    assert loaded.token_bos() == 1 and loaded.token_eos() == 2


def test_ids_and_template_of_byte_level_bpe(tmp_path: Path) -> None:
    latent_model(tmp_path / "model", architecture(vocab_size=512))
    chat_tokenizer(tmp_path / "model", CHATML, vocab_size=400)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    loaded, texts = opened(exported(tmp_path / "model")), strings(1000)
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    found = [loaded.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    different = [texts[n] for n in range(1000) if found[n] != expected[n]]
    assert not different, f"{len(different)} of 1000, such as {different[:3]!r}"
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It."}]
    template = loaded.metadata["tokenizer.chat_template"]
    ends = [loaded._model.token_get_text(number) for number in (loaded.token_eos(), loaded.token_bos())]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(template, *ends, add_generation_prompt=False)
    assert formatter(messages=talk).prompt == theirs.apply_chat_template(talk, tokenize=False)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert ends == [config["eos_token"], config["bos_token"]["content"]]


@pytest.mark.skipif(not MODELS.is_dir(), reason="downloads vocabularies: make test-clients")
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-2"])
def test_ids_of_a_vocabulary_that_llama_cpp_knows_by_its_hash(name: str, tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(MODELS, gguf_file=f"ggml-vocab-{name}.gguf")
    latent_model(tmp_path / "model", architecture(num_layers=1, vocab_size=len(theirs)))
    theirs.save_pretrained(tmp_path / "model")
    loaded, texts = opened(exported(tmp_path / "model", "--embedding-type", "Q8_0")), strings(1000)
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    found = [loaded.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    different = [texts[n] for n in range(1000) if found[n] != expected[n]]
    assert not different, f"{len(different)} of 1000, such as {different[:3]!r}"
    assert len({token for ids in found for token in ids}) > 500, "strings that use the vocabulary"


def test_the_package_that_is_pinned_and_llama_cpp_agree_on_types() -> None:
    """The library that reads the types has the same numbers and sizes for them."""
    from bitcpm_megatron.checkpoint_tools.packed.block_types import GGUF_TYPES

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype, library.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for kind in GGUF_TYPES.values():
        assert library.ggml_type_name(kind.number).decode().upper() == kind.name
        assert library.ggml_type_size(kind.number) == kind.nbytes
        assert library.ggml_blck_size(kind.number) == kind.block
        if kind.name != "Q2_0":
            assert gguf.GGMLQuantizationType(kind.number).name == kind.name


def test_two_layers_of_the_8b_shape_are_of_the_size_that_was_planned(tmp_path: Path) -> None:
    """The planner's sizes of the whole model hold for real files; this takes about 5 GB of disk and a minute of CPU."""
    a = architecture_of("minicpm4-8b")
    latent_model(tmp_path / "model", dataclasses.replace(a, num_layers=2))
    write_sentence_piece(tmp_path / "model")
    matrices = 4096 * (32 * 128 + 2 * 2 * 128) + 32 * 128 * 4096 + 3 * 4096 * 16384
    norms, rows = 4 * 2 * 4096, 2 * 73448 * 4096
    for kind, bits in (("F16", 16), ("Q8_0", 8.5)):
        path = exported(tmp_path / "model", "--embedding-type", kind)
        # LongRoPE's two lists and the last norm are stored in F32, too.
        outside = rows * bits / 8 + 4 * 4096 + 2 * 4 * 64
        layer = matrices * 66 / 256 + norms
        data = sum(tensor.n_bytes for tensor in open_gguf(path).tensors)
        assert data == outside + 2 * layer
        ratio = 2 * (rows + 32 * (matrices + 2 * 4096) + 4096) / (outside + 32 * layer)
        print(f"8b, {kind} embeddings: {data:,} bytes in two layers, {ratio:.2f} times smaller than BF16 in 32")
        assert round(ratio, 1) == {"F16": 5.2, "Q8_0": 6.3}[kind]
        shutil.rmtree(path.parent)
