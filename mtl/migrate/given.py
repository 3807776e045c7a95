"""MFTCoder's training config as it is given: its keys, its defaults, and which have an effect.

The keys are those of its pefts/mft_arguments.py, and for preferences of xxpo/xxpo_arguments.py, in
the released versions.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = ("data_paths", "output_dir", "pretrained_model_path")
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
    **dict.fromkeys(
        (
            "selfpaced_interval",
            "selfpaced_history_length",
            "selfpaced_sample_valid_num",
            "selfpaced_scale_factor",
        ),
        "self-paced weights are not here; see weighted_loss_mode",
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


class Keys(NamedTuple):
    """The keys of a program of MFTCoder's."""

    defaults: dict[str, Any]
    without_effect: dict[str, str]  # key: why it is left out
    file: str  # where MFTCoder has them


PREFERENCE = Keys(
    defaults={
        "xxpo": "dpo",
        "beta": 0.1,
        "rpo_alpha": None,
        "data_split": "98,2,0",
        "peft_type": "qlora",
        "quantization": "4bit",
        "lora_rank": 96,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": None,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "optimizer_type": "adamw_torch",
        "gradient_checkpointing": True,
        "warmup_steps": 0.05,
        "num_train_epochs": 4,
        "max_steps": -1,
        "seed": 1234,
        "save_steps": 100,
        "eval_steps": 100,
        "saving_limit": None,
        "attn_implementation": "flash_attention_2",
        "max_prompt_length": 2048,
        "max_length": 4096,
    },
    without_effect={
        **{
            key: WITHOUT_EFFECT[key]
            for key in (
                "tb_dir", "model_type", "tokenizer_type", "epoch_checkpointing", "auto_resume",
                "resume_from_checkpoint", "shuffle_before_split", "distributed_type",
                "init_timeout_seconds", "make_vocab_size_divisible_by", "model_parallel_size",
                "use_slow_tokenizer", "world_size",
            )
        },
        **dict.fromkeys(
            (
                "chat_template", "weight_decay", "min_lr", "seq_length", "early_stopping",
                "early_stopping_stall_num", "dtype",
            ),
            "MFTCoder does not hand it to its preference trainer",
        ),
        "per_device_eval_batch_size": "evaluate.tokens says how much a validation batch holds",
        "logging_steps": "every step is logged",
        "save_only_model": "checkpoints have the optimizer's state too",
        "gradient_checkpointing_use_reentrant": "never so",
        "dataset_num_proc": "rows are encoded once, into a cache",
        "disable_tqdm": "bars are drawn on terminals only",
        "sanity_check": "all rows are converted; `cap: 100` at the task takes a few",
        "ignore_bias_buffers": "DeepSpeed has no such issue",
    },
    file="xxpo/xxpo_arguments.py",
)  # fmt: skip
SUPERVISED = Keys(DEFAULTS, WITHOUT_EFFECT, "pefts/mft_arguments.py")


class MigrationError(ValueError):
    """What cannot be migrated, and where it stands."""


@dataclass
class Migration:
    """The config as it is read, and what there is to say of it."""

    given: dict[str, Any]
    world: int
    out: Path
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> Keys:
        return PREFERENCE if "xxpo" in self.given else SUPERVISED

    def __getitem__(self, key: str) -> Any:
        return self.given.get(key, self.keys.defaults.get(key))

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{key}: {text}")

    def note_what_is_left_out(self) -> None:
        """Of the given keys those without effect, and what stands in other files."""
        for key in sorted(self.given.keys() & self.keys.without_effect.keys()):
            self.note(key, f"left out: {self.keys.without_effect[key]}")
        self.note(
            "gradient clipping, ZeRO stage",
            "stand in MFTCoder's accelerate and DeepSpeed files: see optimizer.clip and "
            "engine.zero",
        )


def read(path: Path) -> dict[str, Any]:
    """The JSON with $VARIABLES filled from the environment. Raises MigrationError for what is
    unknown, missing or not set.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise MigrationError(
            f"{path}: found no readable JSON ({error}), wanted MFTCoder's training config."
        ) from error
    if not isinstance(given, dict):
        raise MigrationError(f"{path}: found {type(given).__name__}, wanted a JSON object.")
    given = {
        key: os.path.expandvars(value) if isinstance(value, str) else value
        for key, value in given.items()
    }
    # Only the preference program has the key `xxpo`.
    keys = PREFERENCE if "xxpo" in given else SUPERVISED
    known = {*keys.defaults, *REQUIRED, *keys.without_effect}
    problems = [
        f"{key}: found an unknown key, wanted one of MFTCoder's {keys.file}"
        for key in given.keys() - known
    ]
    problems += [f"{key}: found nothing, wanted a value" for key in REQUIRED if not given.get(key)]
    problems += [
        (
            f"{key}: found {value!r}, wanted the value itself; set the variable, or write it into "
            "the file"
        )
        # A variable that is not set stays as it was written.
        for key, value in given.items()
        if isinstance(value, str) and "$" in value and key not in keys.without_effect
    ]
    if problems:
        raise MigrationError("\n".join(f"{path}: {problem}" for problem in sorted(problems)))
    return given
