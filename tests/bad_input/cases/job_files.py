# SPDX-License-Identifier: Apache-2.0
"""Cases of job and sweep files, recipes and presets that are invalid YAML or have invalid contents."""

from collections.abc import Iterator
from pathlib import Path

from .. import damage
from ..commands import COMMANDS
from ..damage import text_file
from .case import Case

_BAD_YAML = {
    "a key twice": "{key}: 1\n{key}: 2\n",
    "a date that is none": "{key}: 2024-13-45\n",
    "5,000 digits": "{key}: " + "9" * 5000 + "\n",
    "nested 3,000 deep": "{key}: " + "[" * 3000 + "]" * 3000 + "\n",
    "a list as key": "? [1, 2]\n: 3\n",
    "a mapping as key": "? {{a: 1}}\n: 3\n",
    "an object": "{key}: !!python/object/apply:os.system ['touch " + damage.MARKER + "']\n",
    "an alias of itself": "{key}: &a [*a]\n",
    "laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    .replace("{", "{{")
    .replace("}", "}}"),
    "a bare word": "word\n",
    "a list": "[1, 2]\n",
    "an unknown key": "no-such-key: 1\n",
    "unfinished": "{key}: [1, 2\n",
    "binary": "\x00\x01\x02",
}


def yaml(world: Path) -> Iterator[Case]:
    """Yields cases of job and sweep files, recipes and presets that are invalid YAML or have invalid contents."""
    train = COMMANDS["pretrain"].good
    for command, argv, name, key in (
        ("run", ("job.yaml", "--print"), "job.yaml", "model"),
        ("preflight", ("job.yaml",), "job.yaml", "model"),
        ("sweep", COMMANDS["sweep"].good, "sweep.yaml", "base"),
        ("pretrain", (*train, "--ternary-recipe", "recipe.yaml"), "recipe.yaml", "configs"),
        ("pretrain", ("--model", "preset.yaml", *train), "preset.yaml", "flags"),
    ):
        for what, text in _BAD_YAML.items():
            yield Case(
                "yaml",
                f"{command} {name}: {what}",
                command,
                argv,
                prepare=text_file(name, text.format(key=key)),
                says=(name,),
            )
    for change in (
        "cluster.nodes=0",
        "cluster.nodes=-1",
        "cluster.nodes=1.5",
        "cluster.nodes=nan",
        "cluster.master-port=99999",
        "cluster.devices-per-node=0",
        "cluster.max-restarts=-1",
        "cluster.subnet=10.0.0.1/8",
        "cluster.hosts=[a b]",
        "cluster.no-such=1",
        "cluster.environment={A B: 1}",
        "training.lr=nan",
        "training.lr=-1",
        "training.lr=.inf",
        "training.micro-batch-size=0",
        "training.micro-batch-size=true",
        "training.train-iters=1e30",
        "training.no-such=1",
        "model.preset=3",
        "model.preset=no-such",
        "model.num-layers=0",
        "data.split=[1]",
        "ternary.ternary=yes",
        "ternary.ternary-group-size=7",
        "host.kind=other",
        "host.flags={a: 1}",
        "nonsense",
        "=1",
        "training.lr.deeper=1",
        "checkpoint.save={a: 1}",
        "training={}",
        "cluster.device-memory-gib=.nan",
    ):
        for command, more in (("run", ("--print",)), ("preflight", ())):
            yield Case(
                "yaml",
                f"{command} --set {change}",
                command,
                ("job.yaml", *more, "--set", change),
                status=(2, 3),
                says=tuple(change.partition("=")[0].split(".")[-1:]) + ("section.key=value", "train-iters"),
            )
    for what, text in {
        "an unknown config": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: b, type: glob, pattern: '*'}}\n",
        "group size 0": "configs: {a: {group_size: 0}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "group size 48": "configs: {a: {group_size: 48}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "group size true": "configs: {a: {group_size: true}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "eps nan": "configs: {a: {eps: .nan}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "eps negative": "configs: {a: {eps: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*.linear_*'}}\n",
        "an idle pattern": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*.no_such'}}\n",
        "no pattern": "configs: {a: {group_size: -1}}\nmatchers: {m: {config: a, type: glob}}\n",
        "a typo": "configs: {a: {group_sise: -1}}\nmatchers: {m: {config: a, type: glob, pattern: '*'}}\n",
        "nothing": "configs: {}\nmatchers: {}\n",
    }.items():
        yield Case(
            "yaml",
            f"recipe: {what}",
            "pretrain",
            (*train, "--ternary-recipe", "recipe.yaml"),
            prepare=text_file("recipe.yaml", text),
            says=("recipe.yaml", "no_such", "group", "48"),
        )
