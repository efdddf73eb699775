# SPDX-License-Identifier: Apache-2.0
"""Minimal test doubles of the upstream packages that the adaptor patches, put into ``sys.modules`` for one test.

They keep only the contracts that ``patches/`` relies on: MindSpeed's features, their list and its patch manager; and
the wrapped functions of ``megatron.training``, which call one another by the names that they imported.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

TRACKER = "latest_checkpointed_iteration.txt"


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content) -> types.ModuleType:
    """Puts a new module of a name, with its parents, into ``sys.modules`` for one test, and returns it."""
    made = types.ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, leaf = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            module(monkeypatch, parent)
        if not hasattr(sys.modules[parent], "__path__"):
            sys.modules[parent].__path__ = []
        monkeypatch.setattr(sys.modules[parent], leaf, made, raising=False)
    return made


class MegatronTraining:
    """A double of ``megatron.training`` in memory; ``run()`` calls its functions in the order of ``pretrain()``."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, build_model, theirs: tuple[str, ...] = (), builders: bool = False
    ) -> None:
        """Creates the modules; with ``builders`` models are built as in core_v0.18 or later, without ``get_model``."""
        self.args = argparse.Namespace()
        self.build_model = build_model
        self.loaded_with: dict = {}
        self.printed: list[str] = []
        self.fails_to_correct = False

        def parse_args(extra_args_provider=None, ignore_unknown_args=False):
            parser = argparse.ArgumentParser(allow_abbrev=False)
            for flag in theirs:
                parser.add_argument(flag, type=float)
            for name in ("load", "save", "ckpt-format", "fp8-format", "qat-scheme"):
                parser.add_argument(f"--{name}")
            parser.add_argument("--use-ascend-mc2", action="store_true")
            if extra_args_provider is not None:
                extra_args_provider(parser)
            return parser.parse_args(self.argv)

        def validate_args(args, defaults=None):
            for name, value in {
                "ckpt_format": "torch_dist",
                "position_embedding_type": "rope",
                "kv_channels": 16,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_layers": 2,
                "max_position_embeddings": 64,
                "vocab_size": None,
                "init_method_std": 0.02,
            }.items():
                if getattr(args, name, None) is None:
                    setattr(args, name, value)
            return args

        def core_transformer_config_from_args(args, config_class=None):
            return types.SimpleNamespace(kv_channels=args.kv_channels, softmax_scale=None)

        def correct_amax_history_if_needed(model):
            """Does nothing; upstream needs it for fp8."""

        def get_model(wrap=True):
            loop = sys.modules["megatron.training.training"]
            chunks = self.build_model()
            if not self.fails_to_correct:
                loop.correct_amax_history_if_needed(chunks)
            return chunks

        def build_distributed_models():
            chunks = self.build_model()
            if not self.fails_to_correct:
                sys.modules["megatron.training.models.dist_utils"].correct_amax_history_if_needed(chunks)
            return chunks

        def setup_model_and_optimizer():
            loop = sys.modules["megatron.training.training"]
            return build_distributed_models() if builders else loop.get_model(), "optimizer", "scheduler"

        def get_checkpoint_name(directory, iteration, release=False, return_base_dir=False):
            base = Path(directory) / ("release" if release else f"iter_{iteration:07d}")
            return str(base if return_base_dir else base / "mp_rank_00" / "model_optim_rng.pt")

        def read_metadata(tracker):
            return int(Path(tracker).read_text()), False

        def checkpoint_exists(directory):
            return directory is not None and (Path(directory) / TRACKER).is_file()

        def save_checkpoint(iteration, model):
            from megatron.core import dist_checkpointing

            base = Path(get_checkpoint_name(self.args.save, iteration, return_base_dir=True))
            if self.args.ckpt_format == "torch_dist":
                base.mkdir(parents=True)
                assert not any(base.iterdir())
                dist_checkpointing.save({}, str(base))
            assert (base / "ternary_quantizer.json").exists() == (self.args.ternary is True)
            (base.parent / TRACKER).write_text(str(iteration))

        def _load_base_checkpoint(directory, args, rank0=False):
            if not checkpoint_exists(directory):
                return None, "", False, None
            iteration, release = read_metadata(Path(directory) / TRACKER)
            dist = args.ckpt_format == "torch_dist"
            return {}, get_checkpoint_name(directory, iteration, release, return_base_dir=dist), release, None

        def load_checkpoint(model):
            here = sys.modules["megatron.training.checkpointing"]
            here._load_base_checkpoint(self.args.load, self.args, rank0=True)
            self.loaded_with = {k: v for chunk in model for k, v in chunk.sharded_state_dict().items()}
            here._load_base_checkpoint(self.args.load, self.args)

        def dist_save(sharded_state_dict, checkpoint_dir):
            """Does nothing instead of writing a checkpoint."""

        from megatron.core import dist_checkpointing
        from megatron.core.pipeline_parallel import schedules

        monkeypatch.setattr(dist_checkpointing, "save", dist_save)
        monkeypatch.setattr(schedules, "get_forward_backward_func", schedules.get_forward_backward_func)
        module(monkeypatch, "megatron.training", get_args=lambda: self.args, print_rank_0=self.printed.append)
        module(monkeypatch, "megatron.training.global_vars", _GLOBAL_ARGS=None, _GLOBAL_TOKENIZER=None)
        module(
            monkeypatch,
            "megatron.training.arguments",
            parse_args=parse_args,
            validate_args=validate_args,
            core_transformer_config_from_args=core_transformer_config_from_args,
        )
        checkpointing = module(
            monkeypatch,
            "megatron.training.checkpointing",
            save_checkpoint=save_checkpoint,
            load_checkpoint=load_checkpoint,
            _load_base_checkpoint=_load_base_checkpoint,
            get_checkpoint_name=get_checkpoint_name,
            get_checkpoint_tracker_filename=lambda directory: str(Path(directory) / TRACKER),
            read_metadata=read_metadata,
            checkpoint_exists=checkpoint_exists,
        )
        module(
            monkeypatch,
            "megatron.training.training",
            get_model=get_model,
            setup_model_and_optimizer=setup_model_and_optimizer,
            correct_amax_history_if_needed=correct_amax_history_if_needed,
            # Imported by name, as upstream does: a patch must also reach these names.
            load_checkpoint=checkpointing.load_checkpoint,
            save_checkpoint=checkpointing.save_checkpoint,
        )

        if builders:
            # core_v0.18 defines the functions in these modules and imports them in the old ones.
            module(
                monkeypatch,
                "megatron.training.argument_utils",
                core_transformer_config_from_args=core_transformer_config_from_args,
            )
            module(
                monkeypatch,
                "megatron.training.models.dist_utils",
                correct_amax_history_if_needed=correct_amax_history_if_needed,
            )

    def run(self, argv: list[str]) -> list[torch.nn.Module]:
        """Parses the arguments, builds the model, loads, and saves; returns the model chunks."""
        self.argv = argv
        here = {n: sys.modules[f"megatron.training.{n}"] for n in ("arguments", "training")}
        self.args = here["arguments"].parse_args()
        self.args = here["arguments"].validate_args(self.args)
        configures = sys.modules.get("megatron.training.argument_utils", here["arguments"])
        self.config = configures.core_transformer_config_from_args(self.args)
        model, *_ = here["training"].setup_model_and_optimizer()
        if self.args.load:
            here["training"].load_checkpoint(model)
        if self.args.save:
            here["training"].save_checkpoint(5, model)
        return model


class LoraLinear(torch.nn.Module):
    """A double of PEFT's ``LoraParallelLinear``: a linear with two small ones beside it."""

    def __init__(self, base_layer: torch.nn.Module, rank: int = 4) -> None:
        super().__init__()
        rows, columns = base_layer.weight.shape
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(columns, rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(rank, rows, bias=False)})
        base_layer.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.base_layer(x)[0] + self.lora_B["default"](self.lora_A["default"](x)), None


class PeftModel(torch.nn.Module):
    """A double of PEFT's ``PeftModel`` around a chunk whose ``decoder`` holds linears, as MindSpeed-LLM makes it."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        super().__init__()
        for name, linear in list(chunk.decoder.items()):
            chunk.decoder[name] = LoraLinear(linear)
        self.base_model = torch.nn.Module()
        self.base_model.model = chunk
        # MindSpeed-LLM adds this module in the same way.
        self.add_module("module", self.get_base_model())

    def get_base_model(self) -> torch.nn.Module:
        return self.base_model.model

    def sharded_state_dict(self) -> dict:
        return {}


class SwapPrefetch:
    """A double of MindSpeed's ``--swap-attention``, which moves tensors saved by graphs to the host for a while."""

    def __init__(self) -> None:
        self.swapped: list[torch.Tensor] = []

    @staticmethod
    def no_swap_tensor(ori_tensor: torch.Tensor) -> bool:
        return ori_tensor.grad_fn is None

    def pack_hook(self, ori_tensor: torch.Tensor) -> torch.Tensor:
        if not self.no_swap_tensor(ori_tensor):
            self.swapped.append(ori_tensor)
        return ori_tensor

    def unpack_hook(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def sync_d2h(self) -> int:
        """Overwrites the tensors whose memory MindSpeed would free; returns their number."""
        for tensor in self.swapped:
            tensor.detach().fill_(float("nan"))
        return len(self.swapped)


class MindSpeed:
    """A double of ``mindspeed`` in memory: its list of features, its patch manager, and an adaptor applying both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer_norm_linear: type) -> None:
        class MindSpeedFeature:
            def __init__(self, feature_name, optimization_level=2):
                self.feature_name, self.optimization_level = feature_name, optimization_level

            def register_args(self, parser):
                """Registers no arguments."""

            def pre_validate_args(self, args):
                """Does nothing."""

            def register_patches(self, patch_manager, args):
                """Registers no patches."""

        class MindSpeedFeaturesManager:
            FEATURES_LIST: list = [MindSpeedFeature("first")]

            @classmethod
            def set_features_list(cls, features_list):
                cls.FEATURES_LIST[:] = features_list

        class PatchesManager:
            wrappers: dict = {}

            @classmethod
            def register_patch(cls, symbol, wrapper):
                # Functions with other names replace the symbol, and a second replacement would raise.
                assert wrapper.__name__.endswith(("wrapper", "decorator")), wrapper
                if wrapper not in cls.wrappers.setdefault(symbol, []):
                    cls.wrappers[symbol].append(wrapper)

            @classmethod
            def apply(cls):
                for symbol, wrappers in cls.wrappers.items():
                    path, _, name = symbol.rpartition(".")
                    owner = importlib.import_module(path)
                    original = function = getattr(owner, name)
                    for wrapper in wrappers:
                        function = wrapper(function)
                    for known in list(sys.modules.values()):
                        if getattr(known, "__dict__", {}).get(name) is original:
                            setattr(known, name, function)

        self.manager, self.feature = MindSpeedFeaturesManager, MindSpeedFeature
        module(monkeypatch, "mindspeed.features_manager.feature", MindSpeedFeature=MindSpeedFeature)
        module(
            monkeypatch,
            "mindspeed.features_manager.features_manager",
            MindSpeedFeaturesManager=MindSpeedFeaturesManager,
        )
        module(
            monkeypatch,
            "mindspeed.te.pytorch.module.layernorm_column_parallel_linear",
            MindSpeedTELayerNormColumnParallelLinear=layer_norm_linear,
        )

        def import_adaptor() -> None:
            """Does what ``import mindspeed.megatron_adaptor`` does."""
            arguments = sys.modules["megatron.training.arguments"]
            parse_args = arguments.parse_args

            def with_features(extra_args_provider=None, ignore_unknown_args=False):
                def provide(parser):
                    for feature in MindSpeedFeaturesManager.FEATURES_LIST:
                        feature.register_args(parser)

                return parse_args(provide, ignore_unknown_args)

            arguments.parse_args = with_features
            for feature in MindSpeedFeaturesManager.FEATURES_LIST:
                feature.register_patches(PatchesManager, argparse.Namespace())
            PatchesManager.apply()
            module(monkeypatch, "mindspeed.megatron_adaptor")

        self.import_adaptor = import_adaptor
