"""The trainer against what people run today, side by side on this machine: `make bench`.

    python benchmarks/bench.py [--peer-python .venv-bench/bin/python] [--groups bf16 ...] [--rounds
    7]

Every group is a few processes that are ready at the same time and take their turns one after
another (A B C A B C ...), so that what disturbs the machine disturbs all of them. Figures are
medians over the rounds, with minimum and maximum; ratios are taken within a round. What must be
equal is checked, and a violation ends the program with an error.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import head
import slopes
from turns import Contender

from mtl.data.plan import EVERY

LR, EXAMPLES, MAX_LENGTH = 1e-4, 16, 128
PAIRS, PREFERENCE_LR = 8, 1e-5  # of two sequences each
MIXTURE = (
    1536,
    0.12,
)  # positions of such a batch when padded, and the part of them that predicts a target
LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}
PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "numpy")
# What mtl/process.py and mtl/distributed/engine.py set for ours, given to the peers from outside.
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "20000",
    "TOKENIZERS_PARALLELISM": "false",
    "THP_MEM_ALLOC_ENABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}

Settings = dict[str, Any]


# --------------------------------------------------------------------------------------------------
# contenders


def ours(
    balancer: Any = "Tokens", precision: str = "fp32", lora: bool = False, **changes: Any
) -> Settings:
    """Changes to configs/even.yaml, whose settings of the batch stand; those of balancer and
    probe are left out.

    One process has nothing to share: ZeRO 0, and with bf16 weights 1, the first stage that has fp32
    master weights. Compiled, and with the attention that is fastest on a CPU where rows are short.

    Args:
        changes: further blocks, laid over the configuration's.
    """
    model = {
        "precision": precision,
        "lora": LORA if lora else None,
        "compile": True,
        "attention": "eager",
    }
    engine = {"zero": 1 if precision == "bf16" else 0}
    return {"program": "ours", "balancer": balancer, "model": model, "engine": engine, **changes}


def released(precision: str, lora: bool = False) -> Settings:
    """CoBa as its authors run it: a training-size validation batch through the model at every step,
    plain slopes.

    56 validation rows of each of 6 tasks in 21 groups: 16 rows, as in a training batch. Packed, and
    the head on targets only, which is more than the released code does.
    """
    coba = {"name": "CoBa", "slope": "ols"}
    return ours(
        coba, precision, lora, evaluate={"probe": {"every": 1, "groups": 21, "examples": "all"}}
    )


def sft(
    precision: str,
    *,
    trainer: str = "sft",
    attention: str | None = None,
    malloc: bool = True,
    **arguments: Any,
) -> Settings:
    """A peer. Without arguments: what TRL does where nothing is said, but for the batch, the
    optimizer and the precision.
    """
    given = {
        "per_device_train_batch_size": EXAMPLES,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "bf16": precision == "bf16_autocast",
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1000,  # the driver says when to stop
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "output_dir": "unused",
    }
    if trainer == "sft":
        given["max_length"] = MAX_LENGTH
    given |= arguments
    return {
        "program": "peer", "trainer": trainer, "attention": attention, "malloc": malloc,
        "arguments": given, "same_rows": not given.get("packing"),
    }  # fmt: skip


def packing(precision: str, row: int, rows: int, **more: Any) -> Settings:
    """TRL's packing into rows of at most `row` tokens, as many a step as hold about EXAMPLES of the
    quickstart's examples.
    """
    return sft(
        precision, packing=True, max_length=row, per_device_train_batch_size=rows,
        gradient_checkpointing=False,
        train_sampling_strategy="random", **more,
    )  # fmt: skip


def flat(precision: str, **more: Any) -> Settings:
    """TRL's padding_free: the same 16 rows as ours, one after another in one row."""
    return sft(precision, padding_free=True, max_length=None, gradient_checkpointing=False, **more)


def mine(precision: str) -> dict[str, Settings]:
    """Ours in a peer's precision; where that is autocast over fp32 weights, beside our own default
    of as many fp32 master weights.
    """
    if precision == "fp32":
        return {"ours": ours("Tokens", precision)}
    return {"ours": ours("Tokens", "bf16"), "ours, autocast": ours("Tokens", precision)}


def packed(precision: str) -> dict[str, Settings]:
    return {
        **mine(precision),
        "TRL packing": packing(precision, 512, 1),
        "TRL packing, compiled": packing(precision, 512, 1, torch_compile=True),
    }


def padded(precision: str) -> dict[str, Settings]:
    return {
        "ours": mine(precision)["ours"],
        "TRL padded, default": sft(precision),
        "TRL padded, no checkpointing": sft(precision, gradient_checkpointing=False),
    }


def full_logits(precision: str) -> dict[str, Settings]:
    return {
        "ours": mine(precision)["ours"],
        "Trainer padded, full logits": sft(precision, trainer="full_logits"),
    }


def preference(precision: str) -> dict[str, Settings]:
    """Ours and TRL's DPOTrainer on the same pairs. TRL has no packing of them.

    Without arguments it holds a second model and asks it at every step. Then as ours does: the
    reference is computed before. Ours has the peer's precision: at this learning rate bf16 weights
    take another path than fp32 weights under autocast.
    """
    own = ours("Tokens", precision)
    alike = {
        "trainer": "dpo",
        "learning_rate": PREFERENCE_LR,
        "per_device_train_batch_size": PAIRS,
    }
    before = {**alike, "precompute_ref_log_probs": True, "gradient_checkpointing": False}
    return {
        "ours": {**own, "optimizer": {"lr": PREFERENCE_LR}},
        "TRL DPO, default": sft(precision, **alike),
        "TRL DPO, reference before, no checkpointing": sft(precision, **before),
    }


def balancers(precision: str, lora: bool) -> dict[str, Settings]:
    return {
        "Equal": ours("Equal", precision, lora),
        "CoBa, defaults": ours("CoBa", precision, lora),
        "CoBa, released": released(precision, lora),
    }


# Few members each: a contender holds up to 6 GB, and all of a group are in memory at once.
GROUPS: dict[str, Callable[[], dict[str, Settings]]] = {
    "packed fp32": lambda: packed("fp32"),
    "packed bf16": lambda: packed("bf16_autocast"),
    "padded fp32": lambda: padded("fp32"),
    "padded bf16": lambda: padded("bf16_autocast"),
    "full logits fp32": lambda: full_logits("fp32"),
    "full logits bf16": lambda: full_logits("bf16_autocast"),
    "preference fp32": lambda: preference("fp32"),
    "preference bf16": lambda: preference("bf16_autocast"),
    "balancers": lambda: balancers("bf16", lora=False),
    "balancers, LoRA": lambda: balancers("bf16", lora=True),
}
# How the peers' settings above were found; not part of a run unless named.
SEARCH: dict[str, Callable[[], dict[str, Settings]]] = {
    "search rows": lambda: {
        "128 x 4": packing("fp32", 128, 4), "256 x 2": packing("fp32", 256, 2), ("512 x "
        "1"): packing("fp32", 512, 1),
        "padding-free": flat("fp32"), "Trainer, flattening": sft("fp32", trainer="flattening"),
    },
    "search kernels": lambda: {
        "sdpa": packing("bf16_autocast", 512, 1),
        "eager": packing("bf16_autocast", 512, 1, attention="eager"),
        "sdpa, default malloc": packing("bf16_autocast", 512, 1, malloc=False),
        "padding-free": flat("bf16_autocast"),
    },
    "search compiled": lambda: {
        "sdpa": packing("bf16_autocast", 512, 1, torch_compile=True),
        "eager": packing("bf16_autocast", 512, 1, attention="eager", torch_compile=True),
        "256 x 2": packing("bf16_autocast", 256, 2, torch_compile=True),
    },
    "search bf16": lambda: {
        "256 x 2": packing("bf16_autocast", 256, 2), ("Trainer, "
        "flattening"): sft("bf16_autocast", trainer="flattening"),
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# running


def pairs(folder: Path) -> Settings:
    """The tasks of the preference groups, from rows of `examples/preferences.py` in `folder`."""
    names = [f"{task}_pairs" for task in ("doc2code", "occupation")]
    return {
        name: {
            "train": str(folder / f"{name}.train.jsonl"),
            "validation": str(folder / f"{name}.valid.jsonl"),
            "format": "preference",
            "objective": {"name": "preference", "loss": "sigmoid", "beta": 0.1},
            "cap": 150,  # the starting model reads every row, and a group needs no more
        }
        for name in names
    }


class Bench:
    """Where contenders are made from settings.

    Args:
        config: the base configuration, as a mapping (configs/even.yaml).
        python: {program: interpreter}.
        work: a folder for the files of the run.
        steps: optimizer steps that every contender will take.
        examples: of a global batch.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        python: Mapping[str, str],
        work: Path,
        steps: int,
        examples: int = EXAMPLES,
    ):
        self.examples = examples
        self.config, self.python, self.work, self.steps = config, dict(python), work, steps
        work.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, suffix: str) -> Path:
        return self.work / f"{name.replace(',', '').replace(' ', '-')}{suffix}"

    def yaml_of(self, name: str, settings: Settings) -> Path:
        """The configuration of one of ours, written into the folder."""
        config = {
            key: value for key, value in self.config.items() if key not in ("balancer", "evaluate")
        }
        config |= {
            "train": {"steps": self.steps + 1, "seed": 0},
            "checkpoint": {"best": False},
            "export": {"which": "none"},
        }
        config["batch"] = {
            **config["batch"],
            "examples": self.examples,
            "max_length": MAX_LENGTH,
        }
        config["optimizer"], config["schedule"] = {"lr": LR}, {"name": "constant"}
        config["evaluate"] = {
            "every": self.steps + 1
        }  # but for the pass at step 0, before the first turn
        config["cache"], config["output"] = str(self.work / "cache"), str(self.work / "no-run")
        for block, values in settings.items():
            if block != "program":
                both = isinstance(values, dict) and isinstance(config.get(block), dict)
                config[block] = {**config[block], **values} if both else values
        path = self.file(name, ".yaml")
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    @functools.cached_property
    def rows(self) -> Path:
        """The file of the rows of every step, for the peers."""
        path = self.work / "rows.json"
        config = self.yaml_of("rows", ours(train={"steps": self.steps}))
        command = [self.python["ours"], str(HERE / "ours.py"), str(config), "--rows", str(path)]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT}, cwd=ROOT)
        return path

    def start(self, name: str, settings: Settings) -> Contender:
        environment = dict(ENVIRONMENT)
        if settings["program"] == "ours":
            argument = self.yaml_of(name, settings)
        else:
            environment |= KEEP_FREED_MEMORY if settings["malloc"] else {}
            argument = self.file(name, ".json")
            about = {key: settings[key] for key in ("trainer", "attention", "arguments")}
            about["arguments"] = {**about["arguments"], "output_dir": str(self.work / "unused")}
            argument.write_text(
                json.dumps({"model": self.config["model"]["name"], "rows": str(self.rows), **about})
            )
        command = [
            self.python[settings["program"]],
            str(HERE / f"{settings['program']}.py"),
            str(argument),
        ]
        return Contender(name, command, environment, self.file(name, ".log"), ROOT)

    def group(
        self,
        members: Mapping[str, Settings],
        rounds: int,
        steps: int,
        warmup: int,
        say: Callable[[str], None],
    ) -> Settings:
        """{member: {"about", "turns"}}: what each prepared, and its turns, of which the first
        (`warmup` steps) is warming up.
        """
        found: Settings = {}
        with ExitStack() as stack:
            running = []
            for name, settings in members.items():
                say(f"  starting {name}")
                running.append(stack.enter_context(self.start(name, settings)))
                found[name] = {
                    "about": running[-1].about,
                    "same_rows": settings.get("same_rows", True),
                    "turns": [],
                }
            for turn in range(rounds + 1):
                taken = steps if turn else warmup
                for each in running:
                    took = {**each.take(taken), "steps": taken}
                    found[each.name]["turns"].append(on_average(took, found[each.name]))
                rates = (f"{name} {rate(value['turns'][-1]):.1f}" for name, value in found.items())
                say(f"  round {turn}/{rounds}, per second: {', '.join(rates)}")
        return found


def on_average(turn: Settings, contender: Settings) -> Settings:
    """The turn; where the trainer packs, with the target tokens that its steps hold on average.

    Packing sorts by length: one step has thrice the targets of another in as many positions.
    """
    if not contender["same_rows"]:
        about = contender["about"]
        turn["tokens"] = turn["steps"] * about["rows_a_step"] * about["tokens"] / about["rows"]
    return turn


def evened(contender: Settings) -> Settings:
    """Its turns with as many target tokens each as they have on average, for comparison with a peer
    that packs.
    """
    turns = contender["turns"][1:]
    mean = statistics.fmean(turn["tokens"] for turn in turns)
    return {
        **contender,
        "turns": [contender["turns"][0], *({**turn, "tokens": mean} for turn in turns)],
    }


def unit(group: str) -> str:
    """What the turns of a group count as their tokens."""
    return "pairs" if group.startswith("preference") else "target tokens"


def rate(turn: Settings) -> float:
    """Target tokens (`unit`) per second."""
    return turn["tokens"] / turn["seconds"]


def own(turn: Settings) -> float:
    """The part of a turn outside model, optimizer and communication, batch preparation on its own
    thread included.
    """
    named = sum(turn[name] for name in ("forward", "backward", "optimizer", "communication"))
    return (turn["seconds"] - named + turn["data_thread"]) / turn["seconds"]


def check(group: str, found: Settings) -> list[str]:
    """What was compared and is equal, as lines.

    Raises:
        SystemExit: something is not.
    """
    told, wrong = [], []

    def expect(holds: bool, text: str) -> None:
        (told if holds else wrong).append(f"{group}: {text}")

    fp32 = "fp32" in group
    first = next(iter(found))
    base = found[first]
    everything = {
        name: value["about"]["tokens"]
        for name, value in found.items()
        if "tokens" in value["about"]
    }
    total = {
        name: sum(turn["tokens"] for turn in value["turns"])
        for name, value in found.items()
        if value["same_rows"]
    }
    expect(len(set(total.values())) == 1, f"{unit(group)} of the run, same rows: {total}")
    if everything:
        expect(
            set(everything.values()) == set(total.values()),
            f"{unit(group)} of the peers' data sets: {everything}",
        )
    for name, value in found.items():
        if "isolation" in value["about"]:
            leak = value["about"]["isolation"]
            expect(
                leak < 1e-5,
                f"{name}: packed sequences do not see each other ({leak:.1e} of the largest logit)",
            )
        if value["same_rows"] and name != first:
            mine, theirs = (x["turns"][0]["losses"][0] for x in (base, value))
            apart = abs(mine / theirs - 1)
            expect(
                apart < (1e-3 if fp32 else 2e-2),
                f"loss of the first batch, {first} {mine:.6f}, {name} {theirs:.6f}",
            )
            if "balancer" not in group:
                ends = [statistics.fmean(x["turns"][-1]["losses"]) for x in (base, value)]
                apart = abs(ends[0] / ends[1] - 1)
                text = f"mean loss of the last turn, {first} {ends[0]:.4f}, {name} {ends[1]:.4f}"
                expect(apart < (1e-2 if fp32 else 5e-2), text)
    if wrong:
        sys.exit("the contenders do not compute the same:\n" + "\n".join(wrong))
    return told


# --------------------------------------------------------------------------------------------------
# reporting


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """median (minimum to maximum)"""
    low, middle, high = (
        form.format(x) for x in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def ratios(a: Settings, b: Settings, what: Callable[[Settings], float]) -> list[float]:
    """`what` of a over that of b, round by round; the first round is warming up."""
    return [what(x) / what(y) for x, y in zip(a["turns"][1:], b["turns"][1:], strict=True)]


def tables(results: Settings) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        (
            f"{results['date']}, commit {results['commit']}; {machine['processor']}, "
            f"{machine['cores']} cores; "
        )
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f". Median (minimum to maximum) of {results['rounds']} interleaved rounds, "
        + f"after {results['warmup']} that warm up.",
        "",
        "| what | against | reach | measured |",
        "|---|---|---:|---:|",
    ]

    def row(what: str, against: str, reach: str, measured: str) -> None:
        lines.append(f"| {what} | {against} | {reach} | {measured} |")

    groups = results["groups"]
    for group, found in groups.items():
        if any(name.startswith("ours") for name in found):
            reach = {"packed": 1.4, "preference": 1.3}.get(group.split()[0], 2.7)
            for own_name, peer in itertools.product(found, found):
                if own_name.startswith("ours") and not peer.startswith("ours"):
                    ours_turns = (
                        found[own_name] if found[peer]["same_rows"] else evened(found[own_name])
                    )
                    times = spread(ratios(ours_turns, found[peer], rate), "{:.2f}x")
                    what = (
                        "bf16" + own_name.removeprefix("ours")
                        if "bf16" in group
                        else group.split()[-1]
                    )
                    row(f"{unit(group)}/s, {what}", peer, f">= {reach}x", times)
        elif group.startswith("balancers"):
            method = "LoRA" if "LoRA" in group else "full"
            for name in [n for n in found if n != "Equal"]:
                reach = "<= 1.05x" if "defaults" in name else ""
                seconds = ratios(found[name], found["Equal"], lambda turn: turn["seconds"])
                row(f"step time, {name}, {method}", "Equal", reach, spread(seconds, "{:.3f}x"))
            for name in [n for n in found if n != "CoBa, released"]:
                shares = [100 * own(turn) for turn in found[name]["turns"][1:]]
                row(
                    f"time in our own code, {name}, {method}",
                    "step time",
                    "<= 2 %",
                    spread(shares, "{:.2f} %"),
                )
                waits = [
                    1e3 * turn["data_wait"] / turn["steps"] for turn in found[name]["turns"][1:]
                ]
                row(
                    f"a step's wait for data, {name}, {method}", "", "0", spread(waits, "{:.2f} ms")
                )
    for each in results.get("slopes", []):
        row(
            f"error of CoBa's slopes, {each['run']} run, "
            f"{'the default' if each['is_default'] else 'a'} window of {each['steps']} steps, "
            f"recordings: {each['recordings']}",
            "a batch every step, plain",
            "<= 0.5" if each["is_default"] else "",
            "{ratio:.2f} ({min:.2f} to {max:.2f})".format(**each),
        )
    for trained, found in results.get("head", {}).items():
        share = found["ours"]["mib"] / found["full"]["mib"]
        what = f"peak memory of loss and logits, head {trained}: {found['ours']['mib']:.0f} MiB"
        row(what, f"full logits: {found['full']['mib']:.0f} MiB", "<= 0.25", f"{share:.2f}")
    for group, found in groups.items():
        lines += [
            "",
            f"| {group} | {unit(group)}/s | seconds a step | peak MiB |",
            "|---|---:|---:|---:|",
        ]
        for name, value in found.items():
            turns = value["turns"][1:]
            seconds = spread([turn["seconds"] / turn["steps"] for turn in turns])
            peak = max(turn["peak_mib"] for turn in turns)
            lines.append(
                f"| {name} | {spread([rate(turn) for turn in turns], '{:.1f}')} | {seconds} | "
                f"{peak:.0f} |"
            )
    lines += ["", "Checked:", "", *(f"- {text}" for text in results["checked"])]
    return "\n".join(lines) + "\n"


def machine(python: Mapping[str, str]) -> Settings:
    """This machine's processor, and the versions in both environments (they must agree on what both
    have).
    """
    code = (
        "import json, importlib.metadata as m\n"
        f"names = [n for n in {PACKAGES!r} if any(True for d in m.distributions(name=n))]\n"
        "print(json.dumps({n: m.version(n) for n in names}))"
    )
    found: dict[str, str] = {}
    for interpreter in python.values():
        out = subprocess.run(
            [interpreter, "-c", code], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for name, version in json.loads(out).items():
            if found.setdefault(name, version).split("+")[0] != version.split("+")[0]:
                sys.exit(
                    f"{name}: found {found[name]} here and {version} in {interpreter}, wanted the "
                    "same"
                )
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    processor = (
        f"{fields.get('model name', platform.processor())}, model {fields.get('model', '?')}"
    )
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "versions": dict(sorted(found.items())),
    }


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


MARKS = "<!-- last measured: written by bench.py -->", "<!-- end -->"


def into_readme(text: str, readme: Path) -> None:
    """Put the table between the marks."""
    start, rest = readme.read_text().split(MARKS[0])
    readme.write_text(f"{start}{MARKS[0]}\n\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def write(results: Settings, out: Path | None) -> None:
    """Write JSON and Markdown to `out`, else into the folder of results, and the table into
    README.md too.
    """
    report = tables(results)
    if not out:
        into_readme(report, HERE / "README.md")
    out = out or HERE / "results" / results["date"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1))
    out.with_suffix(".md").write_text(report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--groups", nargs="+", choices=[*GROUPS, *SEARCH], default=list(GROUPS), metavar="GROUP"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="measured rounds, after one that warms up"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=24,
        help="those of the first, which compile and settle the allocator",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of ours")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers")
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".cache/quickstart",
        help="what launch/quickstart.py made",
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/bench")
    parser.add_argument(
        "--out",
        type=Path,
        help="without suffix; default: benchmarks/results/DATE, and into README.md",
    )
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    text = (
        (ROOT / "configs/even.yaml")
        .read_text()
        .replace(".cache/quickstart", str(args.cache.resolve()))
    )
    python = {"ours": args.python, "peer": args.peer_python}
    now = datetime.datetime.now(datetime.UTC)
    results: Settings = {
        "date": f"{now:%Y-%m-%d}", "commit": commit(), "machine": machine(python),
        "rounds": args.rounds,
        "warmup": args.warmup, "groups": {}, "checked": [],
    }  # fmt: skip
    if not args.out:
        results["slopes"] = slopes.defaults()
        results["head"] = {
            f"{kind}, {positions:,} positions, {targets:.0%} targets": head.measure(
                positions=positions, targets=targets, trained=kind == "trained"
            )
            for positions, targets in (MIXTURE, (4096, 1.0))
            for kind in ("trained", "frozen")
        }
    data = args.cache.resolve() / "data"
    if any(unit(name) == "pairs" for name in args.groups):
        program = str(ROOT / "examples" / "preferences.py")
        subprocess.run([args.python, program, str(data)], check=True)
    for name in args.groups:
        say(name)
        turn = (
            2 * EVERY["LoRA" in name] if "balancers" in name else 4
        )  # steps: two of CoBa's default probes
        config = yaml.safe_load(text)
        examples = EXAMPLES
        if unit(name) == "pairs":
            config["tasks"], examples = pairs(data), PAIRS
        steps = args.warmup + turn * args.rounds
        bench = Bench(config, python, args.work.resolve(), steps, examples)
        found = bench.group((GROUPS | SEARCH)[name](), args.rounds, turn, args.warmup, say)
        results["checked"] += check(name, found)
        results["groups"][name] = found
        write(results, args.out)  # what there is so far: a later group may end the program
    print(tables(results))


if __name__ == "__main__":
    main()
