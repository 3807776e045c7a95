"""DeepSpeed's whole configuration, from ours.

We write every key that matters, because DeepSpeed's defaults differ from what we mean: they clip
gradients at 1.0 and accumulate them in the model's dtype.
"""

import os
from typing import Any

from mtl.config import Config, ConfigError
from mtl.distributed import ds_keys

# In a DeepSpeed configuration for Hugging Face's Trainer this value lets the program decide.
AUTO = "auto"


def ds_config(config: Config, world: int, device_type: str) -> dict[str, Any]:
    """The whole DeepSpeed configuration: ours, and the further keys of the user's
    `engine.deepspeed`.

    Args:
        world: data-parallel ranks.
        device_type: "cpu", "cuda" ...: what the run computes on.

    Raises:
        ConfigError: a key of `engine.deepspeed` contradicts one that our YAML decides; the text
            names both places. Or DeepSpeed does not know the key.
    """
    stage, offload, bf16 = (
        zero_stage(config),
        config.engine.offload,
        config.model.precision == "bf16",
    )
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device_type != "cpu",
        "contiguous_gradients": True,
        "compute_grad_norm": True,
    }
    for ours, theirs in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        where = getattr(offload, ours)
        # Also for "none", so that a user's own block that offloads shows up as a difference.
        zero[theirs] = {"device": where}
        if where != "none":
            zero[theirs]["pin_memory"] = device_type != "cpu"
            if where == "nvme":
                zero[theirs]["nvme_path"] = os.path.expanduser(offload.nvme_path)
    ours = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "torch_autocast": {
            "enabled": config.model.precision == "bf16_autocast",
            "dtype": "bfloat16",
        },
        "zero_optimization": zero,
    }
    if config.model.precision == "bf16_autocast":
        # Empty: gradients are communicated in fp32. Autocast changes only the arithmetic of forward
        # and backward.
        ours["torch_autocast"]["lower_precision_safe_modules"] = []
    problems: list[str] = []
    merged = _merge(ours, dict(config.engine.deepspeed), ("engine", "deepspeed"), config, problems)
    if problems:
        raise ConfigError(problems)
    for key in ("offload_optimizer", "offload_param"):
        if merged["zero_optimization"][key]["device"] == "none":
            del merged["zero_optimization"][key]
    if config.engine.deepspeed and (found := ds_keys.problems(merged)):
        where = ("engine", "deepspeed")
        raise ConfigError([config.error((*where, *keys), *words) for keys, *words in found])
    return merged


def zero_stage(config: Config) -> int:
    """The ZeRO stage in force. At stage 0 DeepSpeed cannot combine bf16 weights with fp32 master
    weights and gradients, so we use 1 there.
    """
    return max(1, config.engine.zero) if config.model.precision == "bf16" else config.engine.zero


# Which key of our YAML decides a key of DeepSpeed's. An error names both. The program itself
# decides keys that are not in this table.
_DECIDED_BY = {
    "train_batch_size": "batch.examples",
    "train_micro_batch_size_per_gpu": "batch.tokens",
    "gradient_accumulation_steps": "batch.tokens",
    "gradient_clipping": "optimizer.clip",
    "bf16.enabled": "model.precision",
    "fp16.enabled": "model.precision",
    "torch_autocast.enabled": "model.precision",
    "torch_autocast.dtype": "model.precision",
    "data_types.grad_accum_dtype": "model.precision",
    "communication_data_type": "model.precision",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer.device": "engine.offload.optimizer",
    "zero_optimization.offload_param.device": "engine.offload.parameters",
    "zero_optimization.offload_optimizer.nvme_path": "engine.offload.nvme_path",
    "zero_optimization.offload_param.nvme_path": "engine.offload.nvme_path",
}
# Blocks of DeepSpeed's that ours replace.
_REPLACED_BY = {"optimizer": "optimizer", "scheduler": "schedule"}
# The user may change these: they concern speed and logs, not what is computed.
_FREE = {
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "wall_clock_breakdown",
    "steps_per_print",
}


def _merge(
    ours: dict, theirs: dict, path: tuple[str, ...], config: Config, problems: list[str]
) -> dict:
    merged = dict(ours)
    for key, value in theirs.items():
        here = (*path, key)
        name = ".".join(here[2:])
        if name in _REPLACED_BY:
            if not _all_auto(value):
                mine = _REPLACED_BY[name]
                problems.append(
                    config.error(
                        here,
                        f"a DeepSpeed {key}",
                        f"none, because `{mine}` decides",
                        f"Move its settings to `{mine}`.",
                    )
                )
        elif isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, here, config, problems)
        elif value == AUTO and key not in ours:
            hint = (
                "No key of this YAML decides it: write the value, or leave the key out for "
                "DeepSpeed's default."
            )
            problems.append(config.error(here, "'auto'", "a value", hint))
        elif value != AUTO and key in ours and name not in _FREE and value != ours[key]:
            mine = _DECIDED_BY.get(name)
            decided = (
                f"{mine} at {config.where(mine)} makes it so"
                if mine
                else "the step's arithmetic needs it"
            )
            problems.append(
                config.error(here, repr(value), repr(ours[key]), f"{decided}; leave this key out.")
            )
        elif value != AUTO:
            merged[key] = value
    return merged


def _all_auto(value: Any) -> bool:
    """Whether a DeepSpeed optimizer or scheduler block leaves every setting to us. Its type is only
    a name.
    """
    if isinstance(value, dict):
        return all(_all_auto(v) for k, v in value.items() if k != "type")
    return value == AUTO
