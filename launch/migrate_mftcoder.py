"""From an MFTCoder training config (JSON) and its data to a YAML and data files of ours.

    python launch/migrate_mftcoder.py coba_train_config.json --world 8 --out migrated

writes migrated/config.yaml, migrated/chat_template.jinja (MFTCoder's role markers) and
migrated/data/TASK.{train,validation}.jsonl, and says of every key what became of it. Nothing is
guessed: a key or a row it does not know is an error.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "mtl").is_dir():  # a checkout, perhaps not installed
    sys.path.insert(0, str(ROOT))

from mtl.config import dump, parse
from mtl.process import exit_code

PAIRS = (
    "prompt answer",
    "prompt response",
    "input output",
    "instruction output",
    "instruction response",
    "question response",
    "question answer",
)
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "bot": "assistant",
    "assistant": "assistant",
}
MARKERS = {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n"}
DEFAULTS = {
    "task_weights": None,
    "data_split": "98,2,0",
    "padding_mode": "padding",
    "tokenize_mode": "sft",
    "weighted_loss_mode": "case3",
    "peft_type": "qlora",
    "lora_rank": 96,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": None,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "min_lr": 5e-6,
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 0.05,
    "num_train_epochs": 4,
    "seed": 1234,
    "seq_length": 4096,
    "checkpointing_steps": 100,
    "evaluation_steps": 100,
    "max_train_steps": None,
    "early_stopping": True,
    "early_stopping_stall_num": 5,
    "saving_limit": None,
    "coba_warmup_steps": 100,
    "coba_history_length": 200,
    "coba_tau": 5,
    "coba_update_interval": 1,
    "attn_implementation": "flash_attention_2",
    "role_markers": None,
    "load_raw_dataset": True,
    "trust_remote_code": True,
    "quantization": "4bit",
}
REQUIRED = ("data_paths", "output_dir", "pretrained_model_path")
WITHOUT_EFFECT = {
    "tb_dir": "TensorBoard's files stand in the output folder",
    "model_type": "transformers tells",
    "data_weights": "MFTCoder does not use it",
    "low_cpu_mem_usage": "always so",
    "tokenizer_type": "transformers tells",
    "log_interval": "every step is logged",
    "epoch_checkpointing": "checkpoints stand at steps",
    "resume_from_checkpoint": (
        "--resume goes on with a run of ours; one of MFTCoder's is a model to start from"
    ),
    "auto_resume": "--resume",
    "shuffle_before_split": "rows are always split in the order of a hash",
    "use_random_sampler": "the order of rows is a function of the seed",
    "use_dynamic_padding": "always so, and rows are packed where the model allows",
    "coba_sample_valid_num": (
        "evaluate.probe.examples says how many rows of each task a probe reads"
    ),
    "distributed_type": "DeepSpeed; see engine.zero",
    "init_timeout_seconds": "engine.timeout_minutes",
    **dict.fromkeys(
        (
            "use_xformers",
            "weight_by_num_documents",
            "make_vocab_size_divisible_by",
            "model_parallel_size",
            "use_slow_tokenizer",
            "world_size",
            "ignore_dataset_cache",
        ),
        "without effect in MFTCoder too",
    ),
}


class MigrationError(ValueError):
    """What cannot be migrated, and where it stands."""


@dataclass
class Migration:
    """The config as it is read, and what there is to say of it."""

    given: dict[str, Any]
    world: int
    out: Path
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.given.get(key, DEFAULTS.get(key))

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{key}: {text}")


def read(path: Path) -> dict[str, Any]:
    """The JSON with $VARIABLES filled from the environment. Raises MigrationError for what is
    unknown, missing or not set.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MigrationError(
            f"{path}: found no readable JSON ({error}), wanted MFTCoder's training config."
        ) from error
    given = {
        key: os.path.expandvars(value) if isinstance(value, str) else value
        for key, value in given.items()
    }
    known = {*DEFAULTS, *REQUIRED, *WITHOUT_EFFECT}
    problems = [
        f"{key}: found an unknown key, wanted one of MFTCoder's pefts/mft_arguments.py"
        for key in given.keys() - known
    ]
    problems += [f"{key}: found nothing, wanted a value" for key in REQUIRED if not given.get(key)]
    problems += [
        (
            f"{key}: found {value!r}, wanted the value itself; set the variable, or write it into the "
            "file"
        )
        for key, value in given.items()
        if isinstance(value, str) and "$" in value and key not in WITHOUT_EFFECT
    ]
    if problems:
        raise MigrationError("\n".join(f"{path}: {problem}" for problem in sorted(problems)))
    return given


def tasks_of(data_paths: str | list[str]) -> dict[str, Path]:
    """MFTCoder's tasks: a folder each, named as the folder."""
    paths = (
        data_paths if isinstance(data_paths, list) else data_paths.strip().strip("[]").split(",")
    )
    folders = [Path(part.strip().strip("'\"")) for part in paths if part.strip()]
    tasks = {re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name): folder for folder in folders}
    if len(tasks) < len(folders):
        raise MigrationError(
            f"data_paths: found {[str(f) for f in folders]}, wanted folders with different names"
        )
    for folder in folders:
        if not folder.is_dir():
            raise MigrationError(f"data_paths: found {folder}, wanted a folder of JSONL files")
    return tasks


def convert(row: Any, where: str) -> tuple[str, dict[str, Any]]:
    """A row of MFTCoder's as (format, row) of ours: `messages` for chats and pairs, `text` for
    plain text.
    """
    if not isinstance(row, dict):
        raise MigrationError(f"{where}: found {type(row).__name__}, wanted an object")
    for question, answer in (pair.split() for pair in PAIRS):
        if question in row and answer in row:
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            turns = [
                {"role": "user", "content": row[question]},
                {"role": "assistant", "content": row[answer]},
            ]
            return "messages", {"messages": system + turns}
    if row.get("chat_rounds"):
        turns = []
        for turn in row["chat_rounds"]:
            if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
                raise MigrationError(
                    f"{where}: found the turn {turn!r}, wanted a content and a role of "
                    f"{', '.join(ROLES)}"
                )
            turns.append({"role": ROLES[turn["role"]], "content": turn["content"]})
        return "messages", {"messages": turns}
    if isinstance(row.get("text"), str):
        return "text", {"text": row["text"]}
    raise MigrationError(
        f"{where}: found the keys {', '.join(row)}, wanted chat_rounds, text or one of the pairs "
        f"{', '.join(PAIRS)}"
    )


def rows_of(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise MigrationError(f"{file}:{number}: found no JSON ({error})") from error
            yield convert(row, f"{file}:{number}")


def write_task(name: str, folder: Path, migration: Migration) -> dict[str, Any]:
    """Split a task's rows as `data_split` says, and write them. Returns its entry of the YAML and
    notes its rows.
    """
    rows = list(rows_of(folder))
    kinds = {kind for kind, _ in rows}
    if len(kinds) != 1:
        raise MigrationError(
            f"{folder}: found rows of {sorted(kinds) or 'no kind'}, wanted rows of one kind in a "
            "task"
        )
    parts = [float(part) for part in re.split("[,/]", migration["data_split"])]
    # By a hash of the row, so that the same row never stands on both sides.
    key = f"{migration['seed']}/".encode()
    rows.sort(
        key=lambda row: hashlib.blake2b(
            key + json.dumps(row[1], sort_keys=True).encode(), digest_size=8
        ).digest()
    )
    train = math.ceil(parts[0] / sum(parts) * len(rows))
    while 0 < train < len(rows) and rows[train] == rows[train - 1]:
        train += 1
    if train == len(rows):
        raise MigrationError(
            f"{folder}: data_split {migration['data_split']} of {len(rows)} rows leaves none for "
            "validation"
        )
    stop = train + math.ceil((parts[1] if len(parts) > 1 else 0) / sum(parts) * len(rows))
    entry: dict[str, Any] = {}
    (migration.out / "data").mkdir(parents=True, exist_ok=True)
    for split, some in (
        ("train", rows[:train]),
        ("validation", rows[train : max(stop, train + 1)]),
    ):
        path = migration.out / "data" / f"{name}.{split}.jsonl"
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in some), encoding="utf-8"
        )
        entry[split] = str(path)
    migration.note(
        f"task {name}",
        f"{train} rows to train on, {len(rows) - train} for validation (and test) of {folder}",
    )
    return {**entry, "format": kinds.pop(), "rows": train}


def balancer(migration: Migration, names: list[str]) -> Any:
    mode, weights = migration["weighted_loss_mode"], migration["task_weights"]
    match mode:
        case "coba":
            migration.note(
                "weighted_loss_mode",
                "CoBa, with slopes and weights as the paper says. To repeat the released code, add "
                "`divergence: released` and `slope: ols` and put it in Bounded with floor "
                f"{1 / (10 * len(names)):.4g}",
            )
            return {
                "name": "CoBa",
                "window": migration["coba_history_length"],
                "warmup": migration["coba_warmup_steps"],
                "tau": float(migration["coba_tau"]),
            }
        case "case3" | "case4" | "selfpaced" | "case2" | "case1":
            became = "Tokens" if mode in ("case1", "case2") else "Equal"
            nearest = {
                "case4": "the mean of rows",
                "selfpaced": "its own weights",
                "case2": "the mean of rows over all tasks",
            }
            if mode in nearest:
                migration.note(
                    "weighted_loss_mode",
                    f"{mode} takes {nearest[mode]}; {became} is the nearest here",
                )
            if weights is None or became == "Tokens":
                return became
            values = [float(w) for w in re.findall(r"[-+.\deE]+", str(weights))]
            if len(values) != len(names):
                raise MigrationError(
                    f"task_weights: found {weights!r}, wanted {len(names)} numbers"
                )
            return {"name": "Static", "weights": values}
    raise MigrationError(
        f"weighted_loss_mode: found {mode!r}, wanted coba, selfpaced, case1, case2, case3 or case4"
    )


def template(migration: Migration) -> str:
    """MFTCoder's layout of a conversation as a chat template; what it trains stands between
    generation tags.
    """
    marker = {
        role: json.dumps(text)
        for role, text in {**MARKERS, **(migration["role_markers"] or {})}.items()
    }
    return (
        "{%- for message in messages -%}\n"
        "{%- if message.role == 'system' -%}{{- "
        + marker["system"]
        + " + message.content + '\\n' -}}\n"
        "{%- elif message.role == 'user' -%}{{- "
        + marker["user"]
        + " + message.content + '\\n' -}}\n"
        "{%- else -%}{{- " + marker["assistant"] + " -}}\n"
        "{%- generation -%}{{- message.content + '\\n' + eos_token -}}{%- endgeneration -%}{{- "
        "'\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- " + marker["assistant"] + " -}}{%- endif -%}\n"
    )


def settings(migration: Migration, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The YAML's content."""
    m = migration
    examples = m.world * m["per_device_train_batch_size"] * m["gradient_accumulation_steps"]
    rows = sum(task.pop("rows") for task in tasks.values())
    steps, epochs = m["max_train_steps"], m["num_train_epochs"]
    total, warmup = steps or math.ceil(epochs * rows / examples), m["num_warmup_steps"]
    shape = {
        "cosine": "cosine",
        "linear": "linear",
        "constant": "constant",
        "constant_with_warmup": "constant",
    }
    if m["lr_scheduler_type"] not in shape:
        raise MigrationError(
            f"lr_scheduler_type: found {m['lr_scheduler_type']!r}, wanted one of {', '.join(shape)}"
        )
    lora = None
    if m["peft_type"]:
        if m["peft_type"] == "qlora" or m["quantization"]:
            m.note("quantization", "LoRA on a bf16 model: weights are not quantized here")
        wanted = m["target_modules"] or "all-linear"
        if isinstance(wanted, str) and wanted != "all-linear":
            wanted = [part.strip().strip("'\"") for part in wanted.strip("[]").split(",")]
        lora = {
            "r": m["lora_rank"],
            "alpha": float(m["lora_alpha"]),
            "dropout": m["lora_dropout"],
            "target_modules": wanted,
        }
    if not m["load_raw_dataset"] or m["tokenize_mode"] != "sft":
        raise MigrationError(
            "load_raw_dataset, tokenize_mode: found tokenized data or pretraining, wanted true and "
            "sft"
        )
    if m["trust_remote_code"]:
        m.note(
            "trust_remote_code",
            "left off; model.allow_remote_code: true lets a model's own code run",
        )
    evaluate: dict[str, Any] = {
        "every": m["evaluation_steps"],
        "probe": {"every": m["coba_update_interval"]},
    }
    if m["early_stopping"]:
        evaluate["patience"] = {"evaluations": m["early_stopping_stall_num"], "action": "log"}
        m.note(
            "early_stopping", "the run ends when every task has stalled, not when their mean has"
        )
    for key in sorted(m.given.keys() & WITHOUT_EFFECT.keys()):
        m.note(key, f"left out: {WITHOUT_EFFECT[key]}")
    m.note(
        "gradient clipping, ZeRO stage",
        "stand in MFTCoder's accelerate and DeepSpeed files: see optimizer.clip and engine.zero",
    )
    return {
        "model": {
            "name": m["pretrained_model_path"],
            "precision": "bf16",
            "activation_checkpointing": True,
            "attention": m["attn_implementation"],
            "chat_template": str(m.out / "chat_template.jinja"),
            "lora": lora,
        },
        "tasks": tasks,
        "batch": {
            "examples": examples,
            "tokens": m["per_device_train_batch_size"] * m["seq_length"],
            "max_length": m["seq_length"],
            "too_long": "drop",
        },
        "train": {**({"steps": steps} if steps else {"epochs": float(epochs)}), "seed": m["seed"]},
        "optimizer": {"lr": m["learning_rate"], "weight_decay": m["weight_decay"]},
        "schedule": {
            "name": shape[m["lr_scheduler_type"]],
            "warmup": warmup if isinstance(warmup, int) else round(warmup * total),
            "floor": m["min_lr"] / m["learning_rate"],
        },
        "balancer": balancer(m, list(tasks)),
        "evaluate": evaluate,
        "checkpoint": {"every": m["checkpointing_steps"], "keep": m["saving_limit"] or 2},
        "trackers": ["console", "jsonl", "tensorboard"],
        "output": m["output_dir"],
        "engine": {"zero": 2},
    }


def migrate(path: Path, world: int, out: Path) -> list[str]:
    """Write the YAML, the template and the data into `out`. Returns what there is to say, a line
    each.
    """
    migration = Migration(read(path), world, out)
    tasks = {
        name: write_task(name, folder, migration)
        for name, folder in tasks_of(migration["data_paths"]).items()
    }
    text = dump(settings(migration, tasks))
    parse(text, str(out / "config.yaml"))  # what we write is what we read
    (out / "chat_template.jinja").write_text(template(migration), encoding="utf-8")
    (out / "config.yaml").write_text(f"# Migrated from {path}.\n{text}", encoding="utf-8")
    return migration.notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="MFTCoder's training config")
    parser.add_argument(
        "--world",
        type=int,
        required=True,
        help="GPUs that it ran on: decides the examples of a global batch",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    for line in migrate(args.config, args.world, args.out):
        print(line)
    print(f"written: {args.out / 'config.yaml'}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
