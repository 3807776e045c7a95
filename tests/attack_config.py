"""Mutated configs: each must be a clean error or a valid config, in under a second of work.

`make attack` runs ten thousand, CI a few hundred.
"""

import random
import time
import traceback
from collections import Counter

import yaml

from mtl.config import ConfigError, parse
from mtl.config.schema import Config
from mtl.plugins import KINDS

BASE = """\
model: {name: gpt2, precision: fp32, lora: {r: 4}}
tasks:
  a: {train: a.jsonl, validation: b.jsonl, format: text, share: 1}
  b: {train: [a.jsonl], validation: b.jsonl, format: {name: messages}, share: 2.5}
mix: {shares: explicit}
batch: {examples: 6, tokens: 128, max_length: 128}
train: {steps: 12}
optimizer: {lr: 1.0e-3, betas: [0.9, 0.99]}
schedule: {warmup: 3}
balancer: {name: CoBa, window: 5, warmup: 3}
evaluate: {every: 6, probe: {every: 4, groups: 2}}
engine: {zero: 2, deepspeed: {zero_optimization: {stage: 2}}}
trackers: [console, jsonl]
output: runs/x
"""
VALUES = [
    None, True, "", " ", "x", "1e-3", "~", "/", "\0", "a\nb", "é" * 3000, -1, 0, 1, 2.5, 1e-300, 1e300,
    10**21, -(10**30), float("inf"), float("nan"), [], {}, [[]], [None], {"name": "x"}, {"": {}},
    ["jsonl", "jsonl"], {"name": "os:system"}, "${x}", "!!python/object:os.system",
]  # fmt: skip
TEXTS = [
    "[" * 3000, "{a: " * 3000, "&a [*a, *a]", "? {a: b}\n: c", "<<: *x", "\t", "- ", ": :", "!!binary x",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "a: &a {x: 1}\n"
    + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{m}'] * 9)}], {n}: 1}}\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
]  # fmt: skip


def places(value: object, at: tuple = ()) -> list[tuple]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [found for key, each in items for found in [(*at, key), *places(each, (*at, key))]]


def mutated(rng: random.Random) -> tuple[str, list[str]]:
    """A config's text and overrides, wrong in one to three ways."""
    data, overrides, text = yaml.safe_load(BASE), [], None
    for _ in range(rng.randint(1, 3)):
        keys = rng.choice(places(data) or [("x",)])
        here = data
        for key in keys[:-1]:
            here = here[key]
        kind = rng.randrange(7)
        if kind == 0 and isinstance(here, dict):
            here.pop(keys[-1], None)
        elif kind == 1 and isinstance(here, dict):
            section = rng.choice(list(Config.model_fields))
            here[section] = rng.choice(VALUES)
        elif kind == 2:
            dotted = ".".join(map(str, keys))
            overrides.append(f"{dotted}={rng.choice([*TEXTS, *map(str, VALUES)])}")
        elif kind == 3:
            text = yaml.safe_dump(data, allow_unicode=True)
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(TEXTS) + text[cut + rng.randrange(20) :]
        elif kind == 4:
            text = yaml.safe_dump(data, allow_unicode=True) + rng.choice(TEXTS)
        else:
            here[keys[-1]] = rng.choice(VALUES)
    return text or yaml.safe_dump(data, allow_unicode=True), overrides


def attack(tries: int, seed: int = 0, limit: float = 1.0) -> tuple[Counter, list[str]]:
    """How many configs were valid and how many refused, and what went wrong otherwise.

    limit: seconds of work, above which a config counts as wrong.
    """
    from mtl.config.spec import check

    rng, counts, bad = random.Random(seed), Counter(), []
    for i in range(tries):
        text, overrides = mutated(rng)
        began, outcome = time.process_time(), "valid"
        try:
            config = parse(text, "attack", overrides, check(KINDS, ()))
            assert parse(yaml.safe_dump(config.resolved())).resolved() == config.resolved()
        except ConfigError as error:
            outcome = "refused"
            if not all(str(problem) for problem in error.problems):
                outcome = "an empty message"
        except Exception:  # whatever it is, it is the find
            outcome = traceback.format_exc(limit=-3)
        seconds = time.process_time() - began
        if seconds > limit:
            outcome = f"{seconds:.1f} s"
        if outcome in ("valid", "refused"):
            counts[outcome] += 1
        else:
            bad.append(f"--- try {i} of seed {seed}\n{text[:600]}\n{overrides}\n{outcome}")
    return counts, bad
