"""The one door to DeepSpeed: its whole configuration, and forward, backward, step, save and load.

Facts this file rests on (DeepSpeed 0.19.8; the tests measure them again):

- A varying number of micro-batches per step is exact with accumulation 1 in the configuration and the boundary set by hand
  before each backward. Forgetting it is silently wrong at ZeRO 1 and 2, so `backward` demands `last`.
- DeepSpeed's defaults clip gradients at 1.0 and accumulate in the model's dtype, so every key that matters is written here.
- `client_state` hands every rank rank 0's copy, and `latest` is written before the last barrier: neither is used.
"""

import ctypes
import io
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which otherwise warns that it guesses
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from mtl import comm, head, reshard
from mtl.config import Config, ConfigError

deepspeed_logger.setLevel(logging.WARNING)

# In a DeepSpeed configuration written for Hugging Face's Trainer: let the program decide.
AUTO = "auto"


def init_process_group(timeout_minutes: float) -> None:
    """Join the process group the launcher describes (deepspeed, torchrun; or alone, when started with plain python).

    Args:
        timeout_minutes: how long a collective may wait. Nothing slow (tokenizing, downloading) belongs after this call.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    if get_accelerator().device_name() == "cpu":
        _keep_freed_memory()
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    # An op for inference on CPUs that only `inference_all_reduce` calls: compiling it takes half a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    if torch.distributed.get_backend() != "gloo":
        comm.open_host_group(timeout)


def _keep_freed_memory() -> None:
    """On the CPU, let glibc's malloc hand freed memory out again instead of returning it to the system.

    A step frees and allocates gigabytes; the system zeroes each page it hands out, about half of a small step's time.
    """
    with suppress(OSError, AttributeError):  # no glibc: nothing lost but time
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def ds_config(config: Config, world: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration: ours, plus the user's `engine.deepspeed` where it says something else.

    Raises:
        ConfigError: a key of `engine.deepspeed` contradicts one that our YAML decides; both places are named.
    """
    stage, offload, bf16 = zero_stage(config), config.engine.offload, config.model.precision == "bf16"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": device().type != "cpu", "contiguous_gradients": True}
    for ours, theirs in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        where = getattr(offload, ours)
        zero[theirs] = {"device": where}  # "none" too, so that a user's own block that offloads is seen to differ
        if where != "none":
            zero[theirs]["pin_memory"] = device().type != "cpu"
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
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "torch_autocast": {"enabled": config.model.precision == "bf16_autocast", "dtype": "bfloat16"},
        "zero_optimization": zero,
    }
    if config.model.precision == "bf16_autocast":
        # Empty: gradients are communicated in fp32; autocast is about the arithmetic of forward and backward only.
        ours["torch_autocast"]["lower_precision_safe_modules"] = []
    problems: list[str] = []
    merged = _merge(ours, dict(config.engine.deepspeed), ("engine", "deepspeed"), config, problems)
    if problems:
        raise ConfigError(problems)
    for key in ("offload_optimizer", "offload_param"):
        if merged["zero_optimization"][key]["device"] == "none":
            del merged["zero_optimization"][key]
    return merged


def build_ops(config: Config, say: Callable[[str], None]) -> None:
    """Compile what DeepSpeed needs for offloading to NVMe, where that is asked for: minutes, once on a file system.

    Raises:
        ConfigError: it cannot be compiled on this machine.
    """
    offload = config.engine.offload
    key = next((key for key in ("optimizer", "parameters") if getattr(offload, key) == "nvme"), None)
    if key is None:
        return
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    wanted = "libaio's headers, a C++ compiler and ninja: apt-get install libaio-dev g++ (dnf: libaio-devel gcc-c++), pip install ninja"
    path, reason = ("engine", "offload", key), "no libaio, or no compiler"
    if builder.is_compatible(verbose=False):
        say(
            "offloading to NVMe: loading DeepSpeed's async_io op; the first time on a machine it is compiled, which takes minutes"
        )
        try:
            builder.load(verbose=False)
            return
        except (OSError, RuntimeError, ImportError) as e:
            reason = str(e).strip().splitlines()[-1]
    raise ConfigError([config.error(path, f"nvme, where DeepSpeed's async_io op cannot be had ({reason})", wanted)])


def zero_stage(config: Config) -> int:
    """The ZeRO stage in force: bf16 weights with fp32 master weights and gradients do not exist at stage 0, so 1 is used."""
    return max(1, config.engine.zero) if config.model.precision == "bf16" else config.engine.zero


# Which key of our YAML decides a key of DeepSpeed's, to name both in an error. What is not here, this program itself decides.
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
# Blocks of DeepSpeed's that would act beside our own, and which of ours takes their place.
_REPLACED_BY = {"optimizer": "optimizer", "scheduler": "schedule"}
# Ours unless the user says otherwise: about speed and logs, not about what is computed.
_FREE = {"zero_optimization.overlap_comm", "zero_optimization.contiguous_gradients", "wall_clock_breakdown", "steps_per_print"}


def _merge(ours: dict, theirs: dict, path: tuple[str, ...], config: Config, problems: list[str]) -> dict:
    merged = dict(ours)
    for key, value in theirs.items():
        here = (*path, key)
        name = ".".join(here[2:])
        if name in _REPLACED_BY:
            if not _all_auto(value):
                mine = _REPLACED_BY[name]
                problems.append(
                    config.error(
                        here, f"a DeepSpeed {key}", f"none, because `{mine}` decides", f"Move its settings to `{mine}`."
                    )
                )
        elif isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, here, config, problems)
        elif value == AUTO and key not in ours:
            hint = "No key of this YAML decides it: write the value, or leave the key out for DeepSpeed's default."
            problems.append(config.error(here, "'auto'", "a value", hint))
        elif value != AUTO and key in ours and name not in _FREE and value != ours[key]:
            mine = _DECIDED_BY.get(name)
            decided = f"{mine} at {config.where(mine)} makes it so" if mine else "the step's arithmetic needs it"
            problems.append(config.error(here, repr(value), repr(ours[key]), f"{decided}; leave this key out."))
        elif value != AUTO:
            merged[key] = value
    return merged


def _all_auto(value: Any) -> bool:
    """Whether every setting in a DeepSpeed optimizer or scheduler block is left to us (its type is only a name)."""
    if isinstance(value, dict):
        return all(_all_auto(v) for k, v in value.items() if k != "type")
    return value == AUTO


@contextmanager
def loading(config: Config, world: int) -> Iterator[None]:
    """Within this context `from_pretrained` builds the model partitioned over the ranks where ZeRO 3 wants it so.

    No rank ever holds the whole model. transformers finds the configuration through a weak reference, hence the variable.
    """
    if zero_stage(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    reference = HfDeepSpeedConfig(ds_config(config, world))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del reference


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within this context partitioned (ZeRO 3) parameters are whole on every rank. Read only. A collective."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext():
        yield


def shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def blocks(module: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The name of a model's longest list of blocks, and these; none where it has no list."""
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda each: len(each[1]), default=("", ()))


class Engine:
    """A model, its optimizer and DeepSpeed.

    Args:
        model: the model; at ZeRO 3 built under `loading`.
        config: the run's configuration.
        optimizer: from a model to its torch optimizer.
        say: takes what was decided otherwise than asked for.

    Attributes:
        module: the bare model. Evaluation and per-task gradients go through it, never through the engine's output.
        world: data-parallel ranks.
        device: where inputs go.
        frozen: names of the parameters that are not trained.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        say: Callable[[str], None] = lambda text: None,
    ):
        head.install(model, config.model.loss_kernel)
        self.world = comm.world()
        if zero_stage(config) != config.engine.zero:
            say(f"engine.zero: {zero_stage(config)}, not {config.engine.zero}: fp32 master weights for bf16 start there")
        if config.engine.offload.optimizer == "nvme":
            say("engine.offload.optimizer: nvme: such a run cannot be resumed, because DeepSpeed does not read its state back")
        built, names = optimizer(model), {id(p): n for n, p in model.named_parameters()}
        self._order = [names[id(p)] for group in built.param_groups for p in group["params"]]
        with redirect_stdout(io.StringIO()):  # it prints memory figures
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=built, config=ds_config(config, self.world), dist_init_required=False
            )
        self.module: nn.Module = self._engine.module
        self.device = device()
        self.frozen = [n for n, p in self.module.named_parameters() if not p.requires_grad]
        self._is_training: bool | None = None
        self._autocast = config.model.precision == "bf16_autocast"
        self._stage = zero_stage(config)
        self._clip = config.optimizer.clip
        if not self._stage:
            self._engine._config.gradient_clipping = 0.0  # `step` clips: it has computed the norm already
            # Alone there is nothing to sum, and DeepSpeed would copy every gradient into buckets and back.
            self._engine.enable_backward_allreduce = self.world > 1

    def forward(self, **inputs: Any) -> Any:
        """The training forward, through DeepSpeed."""
        return self._engine(**inputs)

    def evaluate(self, **inputs: Any) -> Any:
        """A forward of the bare module in the training precision. The caller decides about gradients and eval mode."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module(**inputs)

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """This rank's gradients of a loss computed with `evaluate`, whole, None = unused. The engine's own are left alone."""
        found = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        offload = getattr(self._engine.optimizer, "parameter_offload", None)
        if offload is not None:
            # ZeRO 3 releases a module's parameters when gradients reach its inputs, which those of a few parameters never do.
            offload.release_backward_leftovers()
            offload.partition_all_parameters()
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients. `last`: it is the step's last one, after which ranks are averaged."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Update the parameters with learning rate `lr`; not where the gradient is not finite.

        Returns: the global gradient norm before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if not self._stage:  # there DeepSpeed keeps no norm, and would step whatever the gradient
            trained = [p for p in self.module.parameters() if p.requires_grad]
            for p in trained:
                if p.grad is None:  # unused: as at the other stages, and with more processes, its gradient is 0
                    p.grad = torch.zeros_like(p)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            if norm.isfinite():
                if self._clip and norm > self._clip:
                    torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
                self._engine.step()
            return float(norm)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def train(self) -> None:
        self._mode(True)

    def eval(self) -> None:
        self._mode(False)

    def _mode(self, is_training: bool) -> None:
        # The walk over LoRA's thousand modules takes 6 ms, and every step asks. At first parts are in unlike modes.
        if self._is_training is not is_training or self.module.training is not is_training:
            self._engine.train(is_training)
            self._is_training = is_training

    def save(self, folder: Path) -> None:
        """Write every rank's shard into `folder`. A collective. Frozen parameters are left out: the base model has them."""
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=bool(self.frozen)
        )

    def load(self, folder: Path) -> None:
        """Read this rank's shard from `folder`, onto a fresh engine of the same world size and stage. A collective.

        DeepSpeed unpickles its files without restriction; each is opened with `weights_only` first, so that a file that
        would run code is refused.

        Raises:
            ValueError: a file is missing, holds anything but tensors and plain data, or is of another model; or the optimizer's
                state is offloaded to NVMe.
        """
        _refuse_nvme(self._engine, folder)
        comm.together(lambda: _refuse(folder, self.world if self._stage else 0))
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name, custom_load_fn=self._read_module)
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint it can load there.")

    def reshard(self, folder: Path, scratch: Path, shards: int) -> None:
        """`load` of a checkpoint of another world size or stage, by way of files in `scratch`, a folder that is removed. A collective.

        Args:
            shards: processes that wrote optimizer state into `folder`; 0 at ZeRO 0.

        Raises:
            ValueError: as `load`.
        """
        _refuse_nvme(self._engine, folder)
        comm.together(lambda: _refuse(folder, shards))
        comm.together(lambda: shutil.rmtree(scratch, ignore_errors=True) if comm.rank() == 0 else None)
        self.save(scratch / "engine")
        comm.barrier()
        known = {id(p): name for name, p in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        aliases = {name: known[id(p)] for name, p in every if p.requires_grad}
        comm.together(lambda: reshard.fill(folder, scratch / "engine", comm.rank(), self._order, aliases))
        self.load(scratch / "engine")
        comm.barrier()  # none still reads
        comm.together(lambda: shutil.rmtree(scratch) if comm.rank() == 0 else None)

    def state_dict(self, *, trainable_only: bool = False) -> dict[str, Tensor]:
        """The whole parameters and persistent buffers, on the CPU of rank 0 (elsewhere empty). A collective.

        Gathered one parameter at a time, so that no rank but 0 holds the model, and 0 only in its own memory.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or not trainable_only:
                with gathered([parameter]):
                    if comm.rank() == 0:
                        state[name] = parameter.detach().cpu().clone()
                        assert state[name].shape == shape(parameter), f"{name} is not whole: {state[name].shape}"
        if comm.rank() == 0 and not trainable_only:
            persistent = self.module.state_dict(keep_vars=True)
            state |= {n: b.detach().cpu().clone() for n, b in self.module.named_buffers() if n in persistent}
        return state

    def _read_module(self, src: dict[str, Tensor], dst: nn.Module) -> None:
        # Not DeepSpeed's strict load: it refuses a checkpoint without the frozen parameters. Not its lax one: that takes anything.
        missing, unexpected = dst.load_state_dict(src, strict=False)
        missing = sorted(set(missing) - set(self.frozen))
        if missing or unexpected:
            raise ValueError(
                "The checkpoint is of another model: "
                f"it lacks the trainable {missing[:3]} ({len(missing)}) and has the unknown {unexpected[:3]} ({len(unexpected)})."
            )


# The only classes DeepSpeed's own files hold beside tensors and plain data.
_EXPECTED_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def _refuse_nvme(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """DeepSpeed 0.19.8 loads such a checkpoint without an error, and the parameters are the base model's."""
    if engine.zero_nvme_offload_optimizer() or (folder / "offloaded_tensors").exists():
        raise ValueError(
            f"{folder}: DeepSpeed does not read back the optimizer's state from NVMe (engine.offload.optimizer: nvme), so this "
            "run cannot be resumed. Start anew in another `output`, with cpu if it must be; the checkpoint can still be exported."
        )


def _refuse(folder: Path, shards: int) -> None:
    """Raise ValueError for a checkpoint that is not whole, or that could run code."""
    files = sorted(folder.glob("*.pt"))
    found = sum("zero_pp_rank_" in file.name and file.name.endswith("_optim_states.pt") for file in files)
    if not files or found != shards:
        raise ValueError(
            f"{folder}: found {len(files)} DeepSpeed files (*.pt), {found} of them with optimizer state, wanted that of {shards} "
            "processes: the checkpoint is not whole."
        )
    for file in files:
        if not is_zipfile(file):
            raise ValueError(f"{file}: no file that torch.save writes (a zip archive); it may be damaged, and is refused.")
        foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _EXPECTED_GLOBALS)
        if foreign:
            raise ValueError(
                f"{file}: holds {foreign}, which DeepSpeed never writes and which could run code when loaded. "
                "Load checkpoints from sources you trust only; this one is refused."
            )
