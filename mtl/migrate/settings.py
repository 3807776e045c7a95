"""What MFTCoder's settings are in a YAML of ours."""

import json
import math
import re
from typing import Any

from mtl.migrate.given import Migration, MigrationError

MARKERS = {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n"}


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


def model(m: Migration) -> dict[str, Any]:
    """The section `model`."""
    return {
        "name": m["pretrained_model_path"],
        "precision": "bf16",
        "activation_checkpointing": True,
        "attention": m["attn_implementation"],
        "chat_template": str(m.out / "chat_template.jinja"),
        **_adapter(m),
    }


def schedule(m: Migration, warmup: float, steps: int) -> dict[str, Any]:
    """Name and warm-up, which MFTCoder gives as a number of steps or as a part of all."""
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
    return {
        "name": shape[m["lr_scheduler_type"]],
        # Below 1 it is a part of all steps.
        "warmup": round(warmup if warmup >= 1 else warmup * steps),
    }


def _adapter(m: Migration) -> dict[str, Any]:
    """`model.lora` and `model.quantize`: MFTCoder quantizes with `peft_type: qlora` only, whatever
    `quantization` says.
    """
    if m.given.get("quantization") and m["peft_type"] != "qlora":
        m.note("quantization", "left out: MFTCoder quantizes with peft_type qlora only")
    if not m["peft_type"]:
        return {"lora": None}
    if m["peft_type"] == "qlora":
        m.note("peft_type", "qlora is model.lora with model.quantize: nf4 (extra `qlora`)")
    wanted = m["target_modules"] or "all-linear"
    if isinstance(wanted, str) and wanted != "all-linear":
        wanted = [part.strip().strip("'\"") for part in wanted.strip("[]").split(",")]
    lora = {
        "r": m["lora_rank"],
        "alpha": float(m["lora_alpha"]),
        "dropout": m["lora_dropout"],
        "target_modules": wanted,
    }
    return {"lora": lora, **({"quantize": "nf4"} if m["peft_type"] == "qlora" else {})}


def settings(migration: Migration, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The YAML's content."""
    m = migration
    examples = m.world * m["per_device_train_batch_size"] * m["gradient_accumulation_steps"]
    rows = sum(task.pop("rows") for task in tasks.values())
    steps, epochs = m["max_train_steps"], m["num_train_epochs"]
    total = steps or math.ceil(epochs * rows / examples)
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
    m.note_what_is_left_out()
    return {
        "model": model(m),
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
            **schedule(m, m["num_warmup_steps"], total),
            # MFTCoder gives the lowest rate itself, we its part of the highest.
            "floor": m["min_lr"] / m["learning_rate"],
        },
        "balancer": balancer(m, list(tasks)),
        "evaluate": evaluate,
        "checkpoint": {"every": m["checkpointing_steps"], "keep": m["saving_limit"] or 2},
        "trackers": ["console", "jsonl", "tensorboard"],
        "output": m["output_dir"],
        "engine": {"zero": 2},
    }
