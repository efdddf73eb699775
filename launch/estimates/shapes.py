# SPDX-License-Identifier: Apache-2.0
"""The numbers of a job that checks and estimates share: the shapes of the model, and its parallel layout."""

import argparse
from dataclasses import dataclass

from ...quantization.recipe import Recipe
from ...ternary_flags import ternary_settings
from ...training.mistakes import ffn_channels


@dataclass(frozen=True)
class Linear:
    """A linear module of a decoder layer, over all tensor-parallel shards."""

    path: str  # path of the module with global layer numbers, as in recipes and records
    out_features: int
    in_features: int
    row_parallel: bool  # whether tensor parallelism splits the rows of the weight, or (else) keeps them whole

    @property
    def weights(self) -> int:
        """The number of elements of the weight."""
        return self.out_features * self.in_features

    @property
    def of_expert(self) -> bool:
        """Whether the module belongs to an expert, so that expert parallelism divides it."""
        return ".experts." in self.path


@dataclass(frozen=True)
class Layout:
    """The shapes of a model and its parallel sizes; ``vocab_size`` is without padding, ``experts`` may be 0."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab_size: int | None
    sequence: int
    micro_batch: int
    experts: int
    topk: int
    gated: bool
    tied: bool
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    world: int

    @property
    def dp(self) -> int:
        """The data-parallel size, at least 1."""
        return max(1, self.world // (self.tp * self.pp * self.cp))

    @property
    def stage_layers(self) -> int:
        """The number of layers of the largest pipeline stage."""
        return -(-self.layers // self.pp)

    @property
    def tokens(self) -> float:
        """The number of tokens of a micro-batch on one rank."""
        return self.sequence / self.cp * self.micro_batch

    def share(self, stage: int) -> list[Linear]:
        """Returns the linears of a pipeline stage: those of a contiguous share of the layers.

        Shares differ only in what the recipe decides.
        """
        first = stage * self.stage_layers
        return [x for layer in range(first, min(first + self.stage_layers, self.layers)) for x in self.linears(layer)]

    def parameters(self, stage: int, padded_vocab: int) -> tuple[float, float]:
        """Returns the parameters of a rank of a pipeline stage: the count outside experts, and that of experts."""
        first, last, mine = stage == 0, stage == self.pp - 1, self.share(stage)
        expert = sum(x.weights for x in mine if x.of_expert) / self.tp / self.ep
        dense = sum(x.weights for x in mine if not x.of_expert) / self.tp
        dense += 2 * self.hidden * self.stage_layers + (self.hidden if last else 0)
        embeddings = int(first) + int(last and (not self.tied or self.pp > 1))
        return dense + embeddings * padded_vocab * self.hidden / self.tp, expert

    def multiplied(self) -> float:
        """Returns how many weights of the whole model multiply a token; a forward takes twice as many FLOPs."""
        of_experts = self.topk / self.experts if self.experts else 0.0
        linears = sum(x.weights * (of_experts if x.of_expert else 1) for x in self.all_linears())
        return linears + (self.vocab_size or 0) * self.hidden

    def linears(self, layer: int) -> list[Linear]:
        """Returns the linears of one layer, including those of all experts."""
        prefix = f"decoder.layers.{layer}"
        up, attention = self.ffn * (2 if self.gated else 1), self.heads * self.head_dim
        qkv = attention + 2 * self.groups * self.head_dim
        found = [
            Linear(f"{prefix}.self_attention.linear_qkv", qkv, self.hidden, False),
            Linear(f"{prefix}.self_attention.linear_proj", self.hidden, attention, True),
        ]
        for place in [f"experts.local_experts.{e}." for e in range(self.experts)] or [""]:
            found.append(Linear(f"{prefix}.mlp.{place}linear_fc1", up, self.hidden, False))
            found.append(Linear(f"{prefix}.mlp.{place}linear_fc2", self.hidden, self.ffn, True))
        return found

    def all_linears(self) -> list[Linear]:
        """Returns the linears of all layers."""
        return [linear for layer in range(self.layers) for linear in self.linears(layer)]


def layout_of(args: argparse.Namespace, world: int, vocab_size: int | None) -> Layout:
    """Returns the layout of a job with the arguments of :meth:`.Job.arguments` on ``world`` processes."""
    heads, experts = args.num_attention_heads, args.num_experts or 0
    return Layout(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=(experts and args.moe_ffn_hidden_size) or ffn_channels(args),
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or args.hidden_size // heads,
        vocab_size=vocab_size,
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        experts=experts,
        topk=(args.moe_router_topk or 2) if experts else 1,
        gated=args.swiglu,
        tied=not args.untie_embeddings_and_output_weights,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vpp=args.num_virtual_stages_per_pipeline_rank or 1,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        world=world,
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Returns the recipe that a ternary job asks for.

    Raises:
        ValueError: if the group size is impossible, or the recipe file cannot be read.
    """
    default = ternary_settings(args).default
    if args.ternary_recipe is None:
        return Recipe.all_linears(default)
    return Recipe.from_yaml(args.ternary_recipe, default)
