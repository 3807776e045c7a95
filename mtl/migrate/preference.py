"""MFTCoder's preference training (its xxpo/xxpo_accelerate.py): pairs and settings as ours.

MFTCoder gives a pair's chats to TRL's DPOTrainer or ORPOTrainer. The turns before the last one of
`chosen` are the prompt of both sides. What it leaves to TRL stands here as TRL has it: no dropout,
no weight decay, a rate that falls to 0.
"""

import math
from collections import Counter
from typing import Any

from mtl.migrate.given import Migration, MigrationError
from mtl.migrate.rows import note_unread, paths_of, rows_of, turns_of, write_split
from mtl.migrate.settings import model, schedule

TASK, TOKENS = "preference", "chosen"
# Its layout of a conversation; the answer at the end is followed by the end token at once.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- '<s>assistant\\n' -}}
{%- generation -%}
{{- message.content + ('' if loop.last else '\\n') + eos_token -}}
{%- endgeneration -%}
{{- '' if loop.last else '\\n' -}}
{%- else -%}{{- '<s>' + message.role + '\\n' + message.content + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<s>assistant\\n' -}}{%- endif -%}
"""


def settings(m: Migration) -> dict[str, Any]:
    """The YAML's content. The pairs are written, in two files."""
    loss = {"dpo": "sigmoid", "orpo": "orpo"}.get(m["xxpo"])
    if loss is None:
        raise MigrationError(f"xxpo: found {m['xxpo']!r}, wanted dpo or orpo")
    if not m["max_length"]:
        raise MigrationError("max_length: found null, wanted the most tokens of a side")
    task = write_pairs(m)
    rows = task.pop("rows")
    objective = {"name": "preference", "loss": loss, "beta": m["beta"]}
    tasks = {TASK: {**task, "format": "preference", "objective": objective}}
    examples = m.world * m["per_device_train_batch_size"] * m["gradient_accumulation_steps"]
    steps, epochs = m["max_steps"], m["num_train_epochs"]
    # For the warm-up alone, which may be given as a part of all steps.
    total = steps if steps > 0 else math.ceil(epochs * rows / examples)
    balancer: Any = "Equal"
    if loss == "orpo":
        m.note("xxpo", "orpo's token loss is taken over the answer; TRL takes the prompt's too")
    elif m["rpo_alpha"]:
        tasks[TOKENS] = {"of": [TASK], "loss": "sft"}
        balancer = {"name": "Static", "weights": [1.0, float(m["rpo_alpha"])]}
        m.note(
            "rpo_alpha",
            f"the answers' token loss is the task {TOKENS}; Static divides both weights by their "
            "sum",
        )
    m.note(
        "max_prompt_length",
        f"longer pairs than {m['max_length']} tokens are dropped; MFTCoder first cuts their "
        f"prompts' beginnings down to {m['max_prompt_length']}",
    )
    if m["peft_type"] and m["lora_dropout"]:
        m.note("lora_dropout", "left out: MFTCoder's preference trainer turns dropout off")
    if m["optimizer_type"] != "adamw_torch":
        m.note("optimizer_type", f"AdamW, not {m['optimizer_type']}")
    section = model(m)
    if section["lora"]:
        section["lora"]["dropout"] = 0.0
    m.note_what_is_left_out()
    return {
        "model": {**section, "activation_checkpointing": m["gradient_checkpointing"]},
        "tasks": tasks,
        "batch": {
            "examples": examples,
            # A pair is two sequences.
            "tokens": 2 * m["per_device_train_batch_size"] * m["max_length"],
            "max_length": m["max_length"],
            "too_long": "drop",
        },
        "train": {
            **({"steps": steps} if steps > 0 else {"epochs": float(epochs)}),
            "seed": m["seed"],
        },
        "optimizer": {"lr": m["learning_rate"], "weight_decay": 0.0},
        "schedule": schedule(m, m["warmup_steps"], total),
        "balancer": balancer,
        "evaluate": {"every": m["eval_steps"]},
        "checkpoint": {"every": m["save_steps"], "keep": m["saving_limit"] or 2},
        "trackers": ["console", "jsonl", "tensorboard"],
        "output": m["output_dir"],
        "engine": {"zero": 2},
    }


def write_pairs(m: Migration) -> dict[str, Any]:
    """The pairs of all files as one task, as `rows.write_split`."""
    files = paths_of(m["data_paths"])
    for file in files:
        if not file.is_file():
            raise MigrationError(f"data_paths: found {file}, wanted a JSONL file of pairs")
    rows, unread = [], Counter()
    for where, row in rows_of(files):
        rows.append(convert(row, where))
        unread.update(row.keys() - {"chosen", "rejected"})
    note_unread(TASK, unread, m)
    return write_split(TASK, rows, ", ".join(map(str, files)), m)


def convert(row: Any, where: str) -> dict[str, Any]:
    """A pair of MFTCoder's as a row of our format `preference`: the prompt's turns and two answers.

    Raises:
        MigrationError: no such row, or `rejected` has other turns before its last than `chosen`.
            MFTCoder leaves these unread.
    """
    sides = []
    for name in ("chosen", "rejected"):
        chat = row.get(name) if isinstance(row, dict) else None
        if not isinstance(chat, list) or len(chat) < 2:
            raise MigrationError(
                f"{where}: {name}: found {str(chat)[:60]}, wanted a chat of two turns at least"
            )
        sides.append(turns_of(chat, f"{where}: {name}"))
        if sides[-1][-1]["role"] != "assistant":
            found = sides[-1][-1]["role"]
            raise MigrationError(f"{where}: {name}: found {found} last, wanted the assistant")
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise MigrationError(
            f"{where}: found another prompt in rejected than in chosen, wanted the same turns "
            "before both answers. MFTCoder takes chosen's for both; repair or remove the row"
        )
    return {
        "prompt": chosen[:-1],
        "chosen": chosen[-1]["content"],
        "rejected": rejected[-1]["content"],
    }
