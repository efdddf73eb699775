# SPDX-License-Identifier: Apache-2.0
"""Runs Megatron-LM's own pretrain_gpt.py, unmodified, with the ternary plugin installed.

    torchrun ... launch/pretrain_gpt.py --megatron-path CHECKOUT [--mindspeed-path CHECKOUT] ...its flags... --ternary

``bitcpm_megatron.adaptor`` is imported before the script runs. Without CUDA and without an NPU the job runs on the CPU
(``--distributed-backend gloo``), for tests and small experiments.

Exit status: that of the script; 2 if the plugin refuses what it is asked for, 3 if a proof, at start-up or in the first
training step, finds a layer that is not ternary.
"""

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the launcher's own flags; all other flags are left for the script."""
    from bitcpm_megatron.cli import Parser

    parser = Parser(description=__doc__, add_help=False)
    parser.add_argument("--megatron-path", metavar="DIR", help="a Megatron-LM checkout; default: as PYTHONPATH says")
    parser.add_argument("--mindspeed-path", metavar="DIR", help="a MindSpeed checkout")
    parser.add_argument("--mindspeed-llm-path", metavar="DIR", help="a MindSpeed-LLM checkout; its script is run")
    parser.add_argument("--script", default="pretrain_gpt.py", metavar="FILE", help="in the checkout, or a path")
    return parser


def find_script(args: argparse.Namespace) -> Path:
    """Returns the path of the script to run.

    Raises:
        FileNotFoundError: if a directory is not the checkout that its flag names, or no checkout holds the script.
    """
    for package in ("megatron", "mindspeed", "mindspeed_llm"):
        directory = getattr(args, f"{package}_path")
        if directory is not None and not (Path(directory) / package).is_dir():
            flag = f"--{package.replace('_', '-')}-path"
            raise FileNotFoundError(f"{flag} {directory}: holds no directory {package}/")
    roots = [Path(d) for d in (args.mindspeed_llm_path, args.megatron_path, ".") if d is not None]
    for root in roots:
        if (root / args.script).is_file():
            return (root / args.script).resolve()
    raise FileNotFoundError(f"--script {args.script}: not found in {', '.join(map(str, roots))}")


def prepare(args: argparse.Namespace, script: Path) -> None:
    """Puts the checkouts on the path and installs the plugin and, on a machine without accelerator, the CPU patches."""
    given = [args.mindspeed_llm_path, args.mindspeed_path, args.megatron_path]
    paths = [str(script.parent), *(str(Path(directory).resolve()) for directory in given if directory is not None)]
    sys.path[:0] = paths
    # Helper processes (data loaders, the checkpoint writer) import the same packages.
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    from bitcpm_megatron.patches import cpu, megatron_lm

    on_cpu = not cpu.accelerator()
    if on_cpu:
        cpu.install_for_megatron_lm()
    import bitcpm_megatron.adaptor  # noqa: F401

    if on_cpu:
        megatron_lm.run_on_cpu()


def main() -> int:
    """Prepares the process and then executes the script in this module; returns the exit status.

    Refusals of the plugin are reported, with their exit status, by the hook that the adaptor installs.
    """
    from bitcpm_megatron.cli import BAD_INPUT, DONE, complain, end_imports

    ours, rest = build_parser().parse_known_args()
    try:
        script = find_script(ours)
    except FileNotFoundError as error:
        complain(str(error))
        return BAD_INPUT
    sys.argv = [str(script), *rest]
    prepare(ours, script)
    end_imports()  # the script does not run under cli.run(), which would do so
    # The script runs in this module's namespace and not with runpy, because the checkpoint writer's helper process
    # imports __main__ again.
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), sys.modules["__main__"].__dict__)
    return DONE


# MindSpeed-LLM's checkpoint writer is a new process, not a fork of a patched one.
if __name__ == "__mp_main__":
    from bitcpm_megatron.patches.megatron_core import checkpointing

    checkpointing.write_checkpoints_with_newer_torch()

# Without the guard the helper process of the checkpoint writer would train as well, and hang.
if __name__ == "__main__":
    sys.exit(main())
