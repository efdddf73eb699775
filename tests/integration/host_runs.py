# SPDX-License-Identifier: Apache-2.0
"""Runs of unmodified upstream scripts through ``launch/pretrain_gpt.py`` on the CPU, and their results.

    python tests/integration/host_runs.py --output DIR

runs every case in BF16 and ternary, and prints a Markdown table. It needs the checkouts that :data:`HOSTS` names by
environment variables.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
STUBS = CHECKOUT / "tests" / "stubs"

MODEL = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 64
    --max-position-embeddings 64 --make-vocab-size-divisible-by 128
""".split()
TRAINING = """
    --micro-batch-size 1 --global-batch-size 8 --train-iters 20 --lr 5e-3 --lr-decay-style constant --bf16 --seed 1234
    --split 100,0,0 --num-workers 0 --eval-iters 0 --log-interval 1 --distributed-backend gloo
""".split()
UPSTREAM = """
    --tokenizer-type GPTSentencePieceTokenizer --eval-interval 1000 --no-persist-layer-norm --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
""".split()
SHORT = [1 + 0.1 * i for i in range(8)]
LONG = [2 + 0.3 * i for i in range(8)]
MINICPM = [
    *"--scale-emb 12 --scale-depth 1.4 --dim-model-base 16 --rope-scaling-type longrope".split(),
    *("--rope-scaling-short-factor", *map(str, SHORT), "--rope-scaling-long-factor", *map(str, LONG)),
    *("--rope-scaling-original-max-position-embeddings", "32"),
]
# There are as many samples as a step takes, so that the first loss does not depend on their order.
SAMPLES = 8
LORA = "--lora-r 4 --lora-alpha 8 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2".split()
# Row-parallel weights have two shards at every tensor-parallel size, so that all runs have the same quantized weights.
TERNARY = ["--ternary", "--ternary-row-parallel-shards", "2"]

OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
VIRTUAL = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
TP2 = "--tensor-model-parallel-size 2".split()
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "fusion": (1, ["FUSION"]),
    "full recompute": (1, FULL),
    "selective recompute": (1, ["--recompute-granularity", "selective"]),
    "TP2": (2, TP2),
    "TP2+SP": (2, [*TP2, "--sequence-parallel"]),
    "TP2+SP, fusion": (2, [*TP2, "--sequence-parallel", "FUSION"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "PP2+VPP2": (2, VIRTUAL),
    "DP2, distributed optimizer, overlaps": (2, OVERLAPS),
    "DP2, distributed optimizer, overlaps, fusion": (2, [*OVERLAPS, "FUSION"]),
}
# MindSpeed-LLM's own scripts use these flags.
FUSED = "--use-flash-attn --use-fused-rotary-pos-emb --use-fused-swiglu --use-fused-rmsnorm".split()
LLM = {
    "1 process": (1, []),
    "TP2+SP, distributed optimizer, overlaps, fused kernels, fusion": (
        2,
        [*TP2, "--sequence-parallel", *OVERLAPS, *FUSED, "FUSION"],
    ),
    "PP2+VPP2": (2, VIRTUAL),
}
MINDSPEED = {
    "fused kernels": (1, FUSED),
    "Ulysses CP2": (2, "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo --use-flash-attn".split()),
    "recomputed activation function and norm": (1, "--recompute-activation-function --recompute-norm".split()),
}
# Models of other shapes, with random weights: number of quantized layers on rank 0, number of processes, flags.
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall".split()
OTHER_SHAPES: dict[str, tuple[int, int, list[str]]] = {
    "noop layers, PP2": (8, 2, "--num-layers 6 --noop-layers 0,5 --pipeline-model-parallel-size 2".split()),
    "experts, EP2": (24, 2, [*EXPERTS, "--expert-model-parallel-size", "2"]),
    "dualpipev": (16, 2, "--num-layers 8 --schedules-method dualpipev --pipeline-model-parallel-size 2".split()),
}
# The weights are large enough for activations to be swapped, and two micro-batches are in flight.
LARGE = "--hidden-size 512 --ffn-hidden-size 512 --pipeline-model-parallel-size 2 --ternary-verify-cache".split()
COC = {
    "TP2, COC": (2, [*TP2, "--use-ascend-coc", "--coc-mode", "2", "--coc-parallel-num", "2"]),
    "TP2+SP, COC": (
        2,
        [*TP2, "--sequence-parallel", "--use-ascend-coc", "--coc-mode", "2", "--coc-parallel-num", "2"],
    ),
    "TP2+SP, COC, fusion": (
        2,
        [*TP2, "--sequence-parallel", "--use-ascend-coc", "--coc-mode", "2", "--coc-parallel-num", "2", "FUSION"],
    ),
}


@dataclass(frozen=True)
class Host:
    """A host: an upstream code base whose scripts are run.

    Attributes:
        name: the name in reports.
        megatron: the environment variable with the path of its Megatron-LM.
        mindspeed: the environment variable with the path of its MindSpeed, or None.
        flags: the flags that all its runs get.
        cases: the number of processes and the flags of each case, by its name.
        llm: the environment variable with the path of its MindSpeed-LLM, whose scripts are then run, or None.
        python: the environment variable with the path of the interpreter that it needs; None for the current one.
        packages: the environment variables with directories of packages that it imports, searched before the common
            one.
    """

    name: str
    megatron: str
    mindspeed: str | None
    flags: tuple[str, ...]
    cases: dict[str, tuple[int, list[str]]]
    llm: str | None = None
    python: str | None = None
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Returns the environment variables that are not set or name something that does not exist."""
        names = filter(None, (self.megatron, self.mindspeed, self.llm, self.python))
        return [name for name in names if not os.environ.get(name) or not Path(os.environ[name]).exists()]

    def script(self, name: str) -> Path:
        """Returns the path of a script of the host."""
        return Path(os.environ[self.llm or self.megatron]) / name

    def paths(self) -> list[str]:
        """Returns the flags of the launcher that name the host's checkouts."""
        found = ["--megatron-path", os.environ[self.megatron]]
        found += ["--mindspeed-path", os.environ[self.mindspeed]] if self.mindspeed else []
        return found + (["--mindspeed-llm-path", os.environ[self.llm]] if self.llm else [])


HOSTS = {
    host.name: host
    for host in (
        Host("core_v0.16.1, local", "MEGATRON_LM_PATH", None, ("--transformer-impl", "local"), LAYOUTS),
        Host(
            "core_v0.19.0, local",
            "MEGATRON_LM_019_PATH",
            None,
            ("--transformer-impl", "local"),
            LAYOUTS,
            python="HOST_019_PYTHON",
            packages=("HOST_019_SITE_PACKAGES",),
        ),
        Host(
            "core_v0.12.1 + MindSpeed, local",
            "MEGATRON_LM_012_PATH",
            "MINDSPEED_PATH",
            ("--transformer-impl", "local"),
            {**LAYOUTS, **MINDSPEED, **COC},
            packages=("HOST_012_SITE_PACKAGES",),
        ),
        Host(
            "core_v0.12.1 + MindSpeed, TE",
            "MEGATRON_LM_012_PATH",
            "MINDSPEED_PATH",
            ("--transformer-impl", "transformer_engine", "--use-flash-attn", "--use-fused-rmsnorm"),
            LAYOUTS,
            packages=("HOST_012_SITE_PACKAGES",),
        ),
        Host(
            "core_v0.12.1 + MindSpeed-LLM, local",
            "MEGATRON_LM_012_PATH",
            "MINDSPEED_PATH",
            ("--transformer-impl", "local", "--use-mcore-models"),
            LLM,
            "MINDSPEED_LLM_PATH",
            packages=("HOST_LLM_SITE_PACKAGES", "HOST_012_SITE_PACKAGES"),
        ),
    )
}
HOW_TO = (
    "set MEGATRON_LM_PATH (a Megatron-LM checkout at core_v0.16.1), MEGATRON_LM_019_PATH (core_v0.19.0), "
    "MEGATRON_LM_012_PATH (core_v0.12.1), MINDSPEED_PATH (26.1.0_core_r0.12.1) and MINDSPEED_LLM_PATH (v26.1.0), and "
    "run: make test-hosts"
)


@dataclass(frozen=True)
class Result:
    """The exit status of a run and its output."""

    status: int
    output: str

    @property
    def losses(self) -> list[float]:
        """The loss of every iteration, with the 7 digits that upstream logs."""
        return [float(x) for x in re.findall(r"lm loss: ([0-9.]+E[+-][0-9]+)", self.output)]

    @property
    def divergences(self) -> list[float]:
        """The divergence from the teacher of every iteration that had one."""
        return [float(x) for x in re.findall(r"distill loss: ([0-9.]+E[+-][0-9]+)", self.output)]

    @property
    def norms(self) -> list[str]:
        """The gradient norm of every iteration, as upstream prints it."""
        return re.findall(r"grad norm: ([0-9.]+)", self.output)

    @property
    def proved(self) -> int:
        """The number of layers that the probe confirmed on rank 0; on other ranks, the probe raises if it fails."""
        found = re.search(r"holds bit for bit in (\d+) layers", self.output)
        return int(found.group(1)) if found else 0


def launch(
    script: list[str],
    processes: int,
    flags: Sequence[str],
    stubs: Sequence[Path] = (),
    packages: Sequence[str] = (),
    python: str = sys.executable,
) -> Result:
    """Runs one of our launchers with ``torch.distributed.run`` on the CPU."""
    paths = [str(CHECKOUT), *map(str, stubs), *packages, os.environ.get("HOST_SITE_PACKAGES", "")]
    done = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] + [*script, *flags],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        },
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Result(done.returncode, done.stdout)


def run(host: Host, processes: int, flags: Sequence[str]) -> Result:
    """Runs a host's pretrain_gpt.py; the word FUSION among the flags enables gradient accumulation fusion."""
    fusion = "FUSION" in flags
    stubs = [STUBS] if host.mindspeed else [STUBS / "fusion"] if fusion else []
    flags = [f for f in flags if f != "FUSION"] + ([] if fusion else ["--no-gradient-accumulation-fusion"])
    script = [str(CHECKOUT / "launch" / "pretrain_gpt.py"), *host.paths()]
    packages = [os.environ.get(name, "") for name in host.packages]
    python = os.environ[host.python] if host.python else sys.executable
    return launch(script, processes, [*host.flags, *flags], stubs, packages, python)


def run_ours(processes: int, flags: Sequence[str], log_dir: Path) -> list[float]:
    """Runs our own loop, ``launch/pretrain.py``, and returns its training losses."""
    return [record["lm_loss"] for record in records_of_ours(processes, flags, log_dir)]


def records_of_ours(processes: int, flags: Sequence[str], log_dir: Path) -> list[dict]:
    """Runs our own loop, and returns its records of training steps."""
    shutil.rmtree(log_dir, ignore_errors=True)
    result = launch(
        [str(CHECKOUT / "launch" / "pretrain.py")],
        processes,
        [*flags, "--log-interval", "1", "--log-dir", str(log_dir)],
    )
    assert result.status == 0, result.output[-4000:]
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


@dataclass(frozen=True)
class Material:
    """The data that all runs train on, and the checkpoints that they start from.

    Attributes:
        directory: the directory that contains everything.
    """

    directory: Path

    @property
    def data(self) -> list[str]:
        """Flags that name the token files and the tokenizer."""
        return (
            f"--data-path {self.directory}/train_text_document --tokenizer-model {self.directory}/tokenizer.model "
            f"--data-cache-path {self.directory}/cache"
        ).split()

    @property
    def start(self) -> list[str]:
        """Flags that load the converted Llama, at any parallel layout."""
        return ["--pretrained-checkpoint", str(self.directory / "start")]

    @property
    def minicpm(self) -> list[str]:
        """Flags that load the MiniCPM and describe its architecture."""
        return ["--pretrained-checkpoint", str(self.directory / "start-minicpm"), *MINICPM]

    @property
    def instructions(self) -> list[str]:
        """Flags of supervised fine-tuning in MindSpeed-LLM, with :data:`SAMPLES` samples of several lengths."""
        return (
            "--stage sft --is-instruction-dataset --prompt-type empty --variable-seq-lengths --no-pad-to-seq-lengths "
            f"--finetune --data-path {self.directory}/instructions --tokenizer-type PretrainedFromHF "
            f"--tokenizer-name-or-path {self.directory}/hf-tokenizer"
        ).split()

    @classmethod
    def make(cls, directory: Path) -> "Material":
        """Makes what does not exist yet: data of CPython's prose, converted checkpoints with random weights, and more.

        The vocabulary has 512 tokens. The checkpoints are a Llama and a MiniCPM with the same weights. Instructions
        have random tokens.
        """
        directory.mkdir(parents=True, exist_ok=True)
        tool = [sys.executable, str(CHECKOUT / "launch" / "preprocess_data.py"), "--builtin-corpus", "python-prose"]
        if not (directory / "train_text_document.idx").exists():
            tool += ["--split", "train", "--append-eod", "--train-tokenizer", str(directory / "tokenizer.model")]
            _tool([*tool, "--vocab-size", "512", "--output-prefix", str(directory / "train")])
        if not (directory / "start-minicpm").exists():
            _write_llama(directory / "hf")
            _make_minicpm(directory / "hf", directory / "hf-minicpm")
            tool = [sys.executable, str(CHECKOUT / "checkpoint_tools" / "convert_hf_to_megatron.py")]
            for source, start in (("hf", "start"), ("hf-minicpm", "start-minicpm")):
                if not (directory / start).exists():
                    _tool([*tool, "--load-dir", str(directory / source), "--save-dir", str(directory / start)])
        if not (directory / "hf-tokenizer").exists():
            _write_instructions(directory / "instructions")
            _write_hf_tokenizer(directory / "hf-tokenizer")
        return cls(directory)


def samples() -> list[tuple[list[int], list[int]]]:
    """Returns the tokens and labels (-100 in the prompt) of the samples that :attr:`Material.instructions` names."""
    draw = random.Random(5)
    texts = [[draw.randrange(3, 512) for _ in range(draw.randrange(24, 64))] for _ in range(SAMPLES)]
    return [(tokens, [-100] * (len(tokens) // 3) + tokens[len(tokens) // 3 :]) for tokens in texts]


def _write_instructions(prefix: Path) -> None:
    """Writes samples like MindSpeed-LLM's preprocess_data.py: three token files with one document per sample."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for number, field in enumerate(("input_ids", "labels", "attention_mask")):
        path = f"{prefix}_packed_{field}_document"
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.int32)
        for sample in samples():
            builder.add_document([*sample, [1] * len(sample[0])][number], [len(sample[0])])
        builder.finalize(f"{path}.idx")


def _write_hf_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "</s>", *(f"w{i}" for i in range(3, 512))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def _tool(command: list[str]) -> None:
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command[1]} failed with {done.returncode}:\n{done.stdout[-4000:]}"


def _write_llama(directory: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)


def _make_minicpm(llama: Path, directory: Path) -> None:
    """Writes the weights of a Llama as a MiniCPM with LongRoPE that has the multipliers of :data:`MINICPM`."""
    directory.mkdir(exist_ok=True)
    shutil.copy(llama / "model.safetensors", directory)
    config = json.loads((llama / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling"):
        config.pop(name, None)
    config.update(model_type="minicpm", architectures=["MiniCPMForCausalLM"], rope_theta=10000.0)
    config.update(scale_emb=12, scale_depth=1.4, dim_model_base=16)
    config["rope_scaling"] = {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 32,
    }
    (directory / "config.json").write_text(json.dumps(config))


def main() -> int:
    """Runs the cases of all hosts whose checkouts exist, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for data, checkpoints and logs")
    parser.add_argument("--only", default="", help="cases whose host or name contains this")
    args = parser.parse_args()
    material = Material.make(args.output)
    common = [*MODEL, *TRAINING, *material.data, *material.start]
    reference = run_ours(1, [*common, "--no-gradient-accumulation-fusion", *TERNARY], args.output / "ours")[0]
    print(
        f"| host | case | BF16 loss, first and last | ternary loss, first and last | layers proved (rank 0) | "
        f"first step against launch/pretrain.py ({reference:.6f}) |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for host in HOSTS.values():
        for name, (processes, flags) in host.cases.items():
            if host.missing() or args.only not in f"{host.name}, {name}":
                continue
            found = []
            for kind, more in (("bf16", []), ("ternary", TERNARY)):
                result = run(host, processes, [*common, *UPSTREAM, *flags, *more])
                (args.output / re.sub(r"\W+", "-", f"{host.name} {name} {kind}.log")).write_text(result.output)
                found.append(result)
            if any(r.status or len(r.losses) != 20 for r in found):
                print(f"| {host.name} | {name} | FAILED {[r.status for r in found]} |", flush=True)
                continue
            spans = [f"{r.losses[0]:.4f} -> {r.losses[-1]:.4f}" for r in found]
            error = abs(found[1].losses[0] / reference - 1)
            print(f"| {host.name} | {name} | {spans[0]} | {spans[1]} | {found[1].proved} | {error:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
