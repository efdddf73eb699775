# SPDX-License-Identifier: Apache-2.0
"""Tests of the MiniCPM4 family: presets, flags, and what customize() refuses."""

import argparse
import pickle

import pytest
import torch
import yaml
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from bitcpm_megatron.launch.launcher import presets
from bitcpm_megatron.models.architecture import Architecture, ArchitectureError, LongRope, Multipliers
from bitcpm_megatron.models.customize import customize, softmax_scale
from bitcpm_megatron.models.from_arguments import architecture_of, arguments_of, flags_of, longrope_of, multipliers_of
from bitcpm_megatron.training.flags import parse_args

RUN = "--seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 1 --mock-data --vocab-size 300 --eval-iters 0".split()
LONG = LongRope(tuple(1.0 + i for i in range(8)), tuple(2.0 + i for i in range(8)), 32)
# These are the exact sizes; the model cards' 0.5B, 1B, 3B and 8B are rounded.
PARAMETERS = {
    "minicpm4-0.5b": 433_873_920,
    "bitcpm4-1b": 1_360_258_560,
    "bitcpm-cann-1b": 1_622_165_504,
    "bitcpm-cann-3b": 3_605_834_240,
    "minicpm4-8b": 8_185_253_888,
}


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_command_line(name: str) -> None:
    args = parse_args(presets.expand(["--model", name, *RUN]), 1)
    a = presets.architecture(name)
    assert architecture_of(vars(args), a.vocab_size) == a
    assert a.parameter_count() == PARAMETERS.get(name, a.parameter_count())


@pytest.mark.parametrize("name", [n for n in presets.names() if n.startswith("tiny")])
def test_parameters_are_counted_as_the_model_has_them(name: str, single_rank: None) -> None:
    from bitcpm_megatron.training.model import build_model, parameter_count

    args = parse_args(presets.expand(["--model", name, *RUN]), 1)
    assert parameter_count(build_model(args, 300, with_ddp=False)) == presets.architecture(name).parameter_count()


def test_flags_after_a_preset_override_it() -> None:
    args = parse_args(presets.expand([*RUN, "--num-layers", "7", "--model", "tiny-llama"]), 1)
    assert args.num_layers == 7 and args.hidden_size == 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "huge"], "no preset of that name: choose one of .*minicpm4-8b"),
        (["--model", "tiny-llama", "--model", "tiny-llama"], "twice"),
        (["--model"], "expected one argument"),
    ],
)
def test_presets_that_are_not_there(argv: list[str], message: str) -> None:
    with pytest.raises(presets.PresetError, match=message):
        presets.expand(argv)


def test_a_malformed_preset_is_refused(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    for text, message in (
        ("[1]", "expected a mapping"),
        ("flags: {a: null}", "flags.a: expected true, a value or a list of values, got None"),
        ("flags: {a: --b}", "would be taken for a flag"),
        ("flag: {}", "unknown key flag: did you mean flags?"),
        ("flags: {}\nflags: {}", "twice"),
        ("vocab-size: 0\nflags: {}", "vocab-size: 0: must be 1 to"),
    ):
        file.write_text(text)
        with pytest.raises(presets.PresetError, match=message):
            presets.expand(["--model", str(file)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale-depth", "1", "--residual-multiplier", "1"], "say the same"),
        (["--dim-model-base", "1", "--logits-scaling", "1"], "say the same"),
        (["--dim-model-base", "0"], "--dim-model-base: '0': must be at least 1e-06"),
        (["--scale-emb", "nan"], "--scale-emb: 'nan': expected a finite number"),
        (["--rope-scaling-short-factor", "1"], "without --rope-scaling-type longrope would do nothing"),
        (["--rope-scaling-type", "longrope"], "needs --rope-scaling-short-factor"),
        (
            ["--rope-scaling-type", "longrope", "--rope-scaling-long-factor", "1", "2"],
            "has 2 values, a head of 32 channels needs 16",
        ),
    ],
)
def test_flags_that_cannot_go_together(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(presets.expand(["--model", "tiny-llama", *RUN, *flags]), 1)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", presets.names())
def test_arguments_describe_an_architecture_exactly(name: str) -> None:
    a = presets.architecture(name)
    assert architecture_of(arguments_of(a), a.vocab_size) == a


def test_minicpms_and_granites_flags_say_the_same() -> None:
    shape = {"num_layers": 4, "hidden_size": 64}
    minicpm = multipliers_of({**shape, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16.0})
    granite = multipliers_of({**shape, "scale_emb": 12.0, "residual_multiplier": 0.7, "logits_scaling": 4.0})
    assert minicpm == granite == Multipliers(12.0, 0.7, 4.0, None)
    assert multipliers_of(shape) == Multipliers() and longrope_of(shape) is None


@pytest.mark.parametrize(
    "change",
    [{"swiglu": False}, {"normalization": "LayerNorm"}, {"add_bias_linear": True}, {"num_experts": 4}],
)
def test_models_of_another_family_are_named(change: dict) -> None:
    args = {**arguments_of(presets.architecture("tiny-llama")), **change}
    with pytest.raises(ArchitectureError, match=f"{next(iter(change))}="):
        architecture_of(args, 300)


def test_impossible_architectures_are_refused() -> None:
    good = presets.architecture("tiny-llama")
    for change, message in (
        ({"num_query_groups": 3}, "do not divide"),
        ({"kv_channels": 15}, "must be even"),
        ({"hidden_size": 0}, "hidden_size 0: must be 1 to"),
        ({"num_layers": 10**9}, "num_layers 1000000000: must be 1 to 10000"),
        ({"ffn_hidden_size": 64.5}, "ffn_hidden_size 64.5: expected a whole number"),
        ({"vocab_size": True}, "vocab_size True: expected a whole number"),
        ({"rotary_base": float("inf")}, "rotary_base inf: expected a finite number"),
        ({"longrope": LONG}, "needs 16"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            Architecture(**{**vars(good), **change})


def test_the_attention_factor_of_longrope() -> None:
    assert LONG.effective_attention_factor(32) == 1.0
    assert LONG.effective_attention_factor(1024) == pytest.approx(2**0.5)  # 1024 = 32 ** 2
    assert LongRope((), (), 32, attention_factor=1.25).effective_attention_factor(1024) == 1.25
    assert softmax_scale(Multipliers(), LONG, 16, 32) is None
    assert softmax_scale(Multipliers(), LONG, 16, 1024) == pytest.approx(16**-0.5 * 2)
    assert softmax_scale(Multipliers(attention_multiplier=0.5), LONG, 16, 1024) == pytest.approx(1.0)


def gpt(softmax: float | None = None, **changes) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_scale=softmax,
        attention_dropout=0,
        hidden_dropout=0,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=64,
        position_embedding_type=changes.pop("position", "rope"),
        **changes,
    )


def test_customizing_is_refused_where_it_would_not_hold(single_rank: None) -> None:
    with pytest.raises(ValueError, match="set TransformerConfig.softmax_scale before"):
        customize(gpt(), Multipliers(attention_multiplier=0.5), None)
    with pytest.raises(ValueError, match="set TransformerConfig.softmax_scale before"):
        customize(gpt(), Multipliers(), LONG)
    scale = softmax_scale(Multipliers(), LONG, 16, 64)
    with pytest.raises(ValueError, match="the model has NoneType"):
        customize(gpt(scale, position="learned_absolute"), Multipliers(), LONG)
    with pytest.raises(ValueError, match="rotary-percent"):
        customize(gpt(scale, rotary_percent=0.5), Multipliers(), LONG)
    model = gpt()
    customize(model, Multipliers(embedding_multiplier=2.0), None)
    with pytest.raises(ValueError, match="once per model"):
        customize(model, Multipliers(embedding_multiplier=2.0), None)


def test_what_customizing_installs_can_be_pickled(single_rank: None) -> None:
    model = gpt(softmax_scale(Multipliers(), LONG, 16, 64))
    customize(model, Multipliers(3.0, 0.5, 4.0), LONG)
    add = pickle.loads(pickle.dumps(model.decoder.layers[0].mlp_bda))(False, False)
    assert torch.equal(add((torch.ones(1), None), torch.ones(1), 0.0), torch.tensor([1.5]))
    assert torch.equal(add((torch.ones(1), torch.ones(1)), torch.ones(1), 0.0), torch.tensor([2.0]))
    for hooks in (model.embedding._forward_hooks, model.output_layer._forward_pre_hooks):
        assert len(hooks) == 1 and pickle.loads(pickle.dumps(list(hooks.values())))


def test_checkpoints_compare_multipliers_by_meaning(tmp_path) -> None:
    from bitcpm_megatron.checkpoints.compatibility import check_arguments
    from bitcpm_megatron.checkpoints.directory import CheckpointError

    args = parse_args(presets.expand(["--model", "tiny-minicpm4", *RUN]), 1)
    saved = {**vars(args), **arguments_of(presets.architecture("tiny-minicpm4"))}
    assert saved["scale_depth"] is None and saved["residual_multiplier"] is not None
    check_arguments(args, saved, tmp_path, with_optimizer=False)
    other = argparse.Namespace(**{**vars(args), "scale_emb": 1.0})
    with pytest.raises(CheckpointError, match="multipliers"):
        check_arguments(other, saved, tmp_path, with_optimizer=False)
    # Tokenizers are compared by their content.
    args.tokenizer_identity = {"sha256": "1"}
    check_arguments(args, saved, tmp_path, with_optimizer=False)
    check_arguments(args, {**saved, "tokenizer_identity": {"sha256": "1"}}, tmp_path, with_optimizer=False)
    with pytest.raises(CheckpointError, match="mock data has other tokens"):
        check_arguments(args, {**saved, "tokenizer_identity": {"sha256": "2"}}, tmp_path, with_optimizer=False)


@pytest.mark.parametrize("name", presets.names())
def test_flags_describe_an_architecture_exactly(name: str, tmp_path) -> None:
    a = presets.architecture(name)
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({"vocab-size": a.vocab_size, "flags": flags_of(a)}))
    assert presets.architecture(str(file)) == a


def test_longrope_changes_lists_after_its_original_length(single_rank: None) -> None:
    model = gpt(softmax_scale(Multipliers(), LONG, 16, 64))
    customize(model, Multipliers(), LONG)
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
    for length, factors in ((32, LONG.short_factor), (33, LONG.long_factor)):
        angles = model.rotary_pos_emb.get_freqs_non_repeated(length)
        assert angles.shape == (length, 8)
        torch.testing.assert_close(angles[-1], (length - 1) * inv_freq / torch.tensor(factors))
    for change in ({"original_max_position_embeddings": 1}, {"short_factor": (0.0,)}, {"factor": -1.0}):
        with pytest.raises(ArchitectureError, match="LongRoPE"):
            LongRope(**{**vars(LONG), **change})


def test_a_rotary_forward_that_a_host_replaced_rotates_by_longrope(
    single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MindSpeed's forward for packed samples computes angles from ``inv_freq`` and not by a method."""

    def forward(self, max_seq_len, offset=0, packed_seq=False):
        return torch.outer(torch.arange(max_seq_len) + offset, self.inv_freq)

    model = gpt(softmax_scale(Multipliers(), LONG, 16, 64))
    customize(model, Multipliers(), LONG)
    expected = {length: model.rotary_pos_emb.get_freqs_non_repeated(length) for length in (33, 32)}
    monkeypatch.setattr(RotaryEmbedding, "forward", forward)
    for length in (33, 32):
        assert torch.equal(model.rotary_pos_emb(length, packed_seq=True), expected[length])
    assert torch.equal(model.rotary_pos_emb(32, 1), expected[33][1:])
