"""The one door to DeepSpeed: forward, backward, step, save and load.

This file relies on these facts of DeepSpeed 0.19.8, which the tests measure again:

- A varying number of micro-batches per step is exact with accumulation 1 in the configuration and
  the boundary set by hand before each backward. Forgetting it is silently wrong at ZeRO 1 and 2, so
  `backward` demands `last`.
- `client_state` hands every rank rank 0's copy, and `latest` is written before the last barrier. We
  use neither.
"""

import ctypes
import errno
import hashlib
import io
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

if not torch.accelerator.is_available():
    # Set before the import, which otherwise warns that it guesses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from mtl import process
from mtl.config import Config, ConfigError
from mtl.distributed import comm, rendezvous, reshard, watchdog
from mtl.distributed.ds_config import ds_config, zero_stage

deepspeed_logger.setLevel(logging.WARNING)


def init_process_group(timeout_minutes: float, watchdog_minutes: float | None = None) -> None:
    """Join the process group that the launcher describes. Started with plain python, the process is
    alone in it.

    Args:
        timeout_minutes: how long a collective may wait. Do slow work (tokenizing, downloading)
            before this call.
        watchdog_minutes: how long a process may stand still before all say where they are; None:
            as long as it likes.

    Raises:
        RendezvousError: a rank is missing, has failed before, or does not know the port.
    """
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    # Among several each rank would invent its own, and wait there.
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", str(process.free_port()))
    if get_accelerator().device_name() == "cpu":
        _keep_freed_memory()
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if meeting := rendezvous.meet(timeout_minutes):
        meeting.ready(timeout_minutes * 60)
    # Only `inference_all_reduce` needs this op. Compiling it would take half a minute at the first
    # start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    if torch.distributed.get_backend() != "gloo":
        comm.open_host_group(timeout)
    store = meeting.store if meeting else None
    watchdog.start(
        store, comm.rank(), comm.world(), watchdog_minutes, process.tell, timeout_minutes
    )


def _keep_freed_memory() -> None:
    """On the CPU, let glibc's malloc reuse freed memory instead of returning it to the system.

    A step frees and allocates gigabytes. The system zeroes each page that it hands out, which takes
    about half of a small step's time.
    """
    with suppress(OSError, AttributeError):  # no glibc: nothing lost but time
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: everything from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def build_ops(config: Config, say: Callable[[str], None]) -> None:
    """Compile what DeepSpeed needs to offload to NVMe, if the config asks for that. It takes
    minutes, once for each file system.

    Raises:
        ConfigError: it cannot be compiled on this machine.
    """
    offload = config.engine.offload
    key = next(
        (key for key in ("optimizer", "parameters") if getattr(offload, key) == "nvme"), None
    )
    if key is None:
        return
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    wanted = (
        "libaio's headers, a C++ compiler and ninja: apt-get install libaio-dev g++ (dnf: "
        "libaio-devel gcc-c++), pip install ninja"
    )
    path, reason = ("engine", "offload", key), "no libaio, or no compiler"
    if builder.is_compatible(verbose=False):
        say(
            "offloading to NVMe: loading DeepSpeed's async_io op. The first time on a machine "
            "this compiles it, which takes minutes"
        )
        try:
            builder.load(verbose=False)
            return
        except (OSError, RuntimeError, ImportError) as e:
            reason = str(e).strip().splitlines()[-1]
    raise ConfigError(
        [config.error(path, f"nvme, but DeepSpeed's async_io op does not build ({reason})", wanted)]
    )


@contextmanager
def loading(config: Config, world: int) -> Iterator[None]:
    """Within this context `from_pretrained` partitions the model over the ranks at ZeRO 3.

    No rank ever holds the whole model. The variable keeps the configuration alive: transformers
    holds only a weak reference.
    """
    if zero_stage(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    reference = HfDeepSpeedConfig(ds_config(config, world, device().type))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del reference


@contextmanager
def gathered(parameters: list[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Within this context partitioned (ZeRO 3) parameters are whole on every rank. A collective.

    Args:
        modify: rank 0 may change the parameters, and every rank keeps its changes.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    rank = 0 if modify else None
    with deepspeed.zero.GatheredParameters(partitioned, rank) if partitioned else nullcontext():
        yield


def shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def fingerprint(module: nn.Module) -> str:
    """Hexadecimal, the same on every rank and at every stage; equal for equal parameters and
    persistent buffers. A collective.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, each in _whole(module):
        digest.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
        digest.update(each.cpu().flatten().view(torch.uint8).numpy())
    return comm.on_first(digest.hexdigest)


def _whole(module: nn.Module, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """On rank 0 each whole parameter and persistent buffer by name, one at a time; elsewhere
    nothing. A collective: go through it to its end.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with gathered([parameter]):
                if comm.rank() == 0:
                    assert parameter.shape == shape(parameter), (
                        f"{name} is not whole: {parameter.shape}"
                    )
                    yield name, parameter.detach()
    if comm.rank() == 0 and not trainable_only:
        persistent = module.state_dict(keep_vars=True)
        for name, buffer in module.named_buffers():
            if name in persistent:
                yield name, buffer.detach()


class Engine:
    """A model, its optimizer and DeepSpeed.

    Args:
        model: the model; at ZeRO 3 built under `loading`.
        config: the run's configuration.
        optimizer: from a model to its torch optimizer.
        say: takes messages for people, about differences from what the config asks.

    Attributes:
        module: the bare model. Evaluation and per-task gradients use it, never the engine's output.
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
        self.world = comm.world()
        if zero_stage(config) != config.engine.zero:
            say(
                f"engine.zero: {zero_stage(config)}, not {config.engine.zero}: DeepSpeed keeps "
                "fp32 master weights for bf16 from that stage on"
            )
        if config.engine.offload.optimizer == "nvme":
            say(
                "engine.offload.optimizer: nvme: this run cannot be resumed, because DeepSpeed "
                "does not read its state back"
            )
        built, names = optimizer(model), {id(p): n for n, p in model.named_parameters()}
        self._order = [names[id(p)] for group in built.param_groups for p in group["params"]]
        with redirect_stdout(io.StringIO()):  # it prints memory figures
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=built,
                config=ds_config(config, self.world, device().type),
                dist_init_required=False,
            )
        self.module: nn.Module = self._engine.module
        self.device = device()
        self.frozen = [n for n, p in self.module.named_parameters() if not p.requires_grad]
        self._is_training: bool | None = None
        self._autocast = config.model.precision == "bf16_autocast"
        self._stage = zero_stage(config)
        self._clip = config.optimizer.clip
        if not self._stage:
            self._engine._config.gradient_clipping = (
                0.0  # `step` clips: it has computed the norm already
            )
            # One process has nothing to sum. DeepSpeed would still copy every gradient into buckets
            # and back.
            self._engine.enable_backward_allreduce = self.world > 1

    def forward(self, **inputs: Any) -> Any:
        """The training forward, through DeepSpeed."""
        return self._engine(**inputs)

    def evaluate(self, **inputs: Any) -> Any:
        """A forward of the bare module in the training precision. The caller decides about
        gradients and eval mode.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module(**inputs)

    @property
    def in_step(self) -> bool:
        """Whether every forward is a collective, so that all ranks must make as many (ZeRO 3)."""
        return self._stage == 3 and self.world > 1

    def generate(self, **inputs: Any) -> Tensor:
        """transformers' `generate` of the bare module, in the training precision. At ZeRO 3 a
        collective: a rank that is done goes on until all are.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module.generate(**inputs, synced_gpus=self.in_step)

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """This rank's whole gradients of a loss that `evaluate` computed; None = unused. The
        engine's own gradients do not change.
        """
        found = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        offload = getattr(self._engine.optimizer, "parameter_offload", None)
        if offload is not None:
            # ZeRO 3 releases a module's parameters when gradients reach its inputs. The gradients
            # of only some parameters never get there.
            offload.release_backward_leftovers()
            offload.partition_all_parameters()
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients. `last`: it is the step's last one, so the ranks average
        now.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, *, drop: bool = False) -> float:
        """Update the parameters with learning rate `lr`, unless the gradient is not finite. Either
        way the gradient is gone afterwards.

        Args:
            drop: make no update, on any rank. A loss that is not finite may have a finite gradient.

        Returns:
            the global gradient norm before clipping; nan with `drop`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        if not self._stage:  # DeepSpeed keeps no norm here, and would step with any gradient
            trained = [p for p in self.module.parameters() if p.requires_grad]
            for p in trained:
                if (
                    p.grad is None
                ):  # unused: as at the other stages, and with more processes, its gradient is 0
                    p.grad = torch.zeros_like(p)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
            norm = norm * torch.nan if drop else norm
            if norm.isfinite():
                if self._clip and norm > self._clip:
                    torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
                self._engine.step()
            else:
                self._engine.zero_grad()
            return float(norm)
        with _no_norm(self._engine.optimizer) if drop else nullcontext():
            self._engine.step()
        return torch.nan if drop else float(self._engine.get_global_grad_norm())

    def train(self) -> None:
        self._mode(True)

    def eval(self) -> None:
        self._mode(False)

    def _mode(self, is_training: bool) -> None:
        # Every step calls this, and a walk over LoRA's thousand modules takes 6 ms. But at first
        # some modules are in the other mode.
        if self._is_training is not is_training or self.module.training is not is_training:
            self._engine.train(is_training)
            self._is_training = is_training

    def save(self, folder: Path) -> None:
        """Write every rank's shard into `folder`. Frozen parameters are left out: the base model
        has them. A collective.

        Raises:
            OSError: a shard of this rank cannot be written.
            RankError: one of another rank.
        """
        with _noted(self._engine) as failed:
            self._engine.save_checkpoint(
                str(folder.parent),
                tag=folder.name,
                save_latest=False,
                exclude_frozen_parameters=bool(self.frozen),
            )

        def tell() -> None:
            if failed:
                raise failed[0]

        comm.together(tell)

    def load(self, folder: Path) -> None:
        """Read this rank's shard from `folder`, onto a fresh engine of the same world size and
        stage. A collective.

        DeepSpeed unpickles its files without restriction. So we open each with `weights_only`
        first, and refuse a file that would run code.

        Raises:
            ValueError: a file is missing, is of another model, or holds more than tensors and plain
                data. Or the optimizer's state is offloaded to NVMe.
        """
        _refuse_nvme(self._engine, folder)
        comm.together(lambda: _refuse(folder, self.world if self._stage else 0))
        path, _ = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, custom_load_fn=self._read_module
        )
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint it can load there.")

    def reshard(self, folder: Path, scratch: Path, shards: int) -> None:
        """Read a checkpoint of another world size or stage. It writes files into the folder
        `scratch` and removes them. A collective.

        Args:
            shards: processes that wrote optimizer state into `folder`; 0 at ZeRO 0.

        Raises:
            ValueError: as `load`.
        """
        _refuse_nvme(self._engine, folder)
        comm.together(lambda: _refuse(folder, shards))
        comm.on_first(lambda: shutil.rmtree(scratch, ignore_errors=True))
        self.save(scratch / "engine")
        comm.barrier()
        known = {id(p): name for name, p in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        aliases = {name: known[id(p)] for name, p in every if p.requires_grad}
        comm.together(
            lambda: reshard.fill(folder, scratch / "engine", comm.rank(), self._order, aliases)
        )
        self.load(scratch / "engine")
        comm.barrier()  # no rank reads any more
        comm.on_first(lambda: shutil.rmtree(scratch))

    def state_dict(self, *, trainable_only: bool = False) -> dict[str, Tensor]:
        """The whole parameters and persistent buffers, on the CPU of rank 0 (elsewhere empty). A
        collective.

        They are gathered one parameter at a time. So only rank 0 holds the model, in the host's
        memory.
        """
        return {name: each.cpu().clone() for name, each in _whole(self.module, trainable_only)}

    def checksums(self) -> dict[str, int]:
        """CRC-32 of every parameter that this rank holds whole, by name. Ranks must agree on them.

        At ZeRO 3 every parameter is DeepSpeed's, so there are none.
        """
        return {
            name: zlib.crc32(p.detach().cpu().flatten().view(torch.uint8).numpy())
            for name, p in self.module.named_parameters()
            if not hasattr(p, "ds_id")
        }

    def not_finite(self) -> list[str]:
        """Names of the trained parameters that are not finite in what this rank holds of them."""
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [name for name, p in trained if not getattr(p, "ds_tensor", p).isfinite().all()]

    def _read_module(self, src: dict[str, Tensor], dst: nn.Module) -> None:
        # DeepSpeed's strict load refuses a checkpoint without the frozen parameters. Its lax load
        # takes anything. So we compare the names ourselves.
        missing, unexpected = dst.load_state_dict(src, strict=False)
        missing = sorted(set(missing) - set(self.frozen))
        if missing or unexpected:
            raise ValueError(
                "The checkpoint is of another model: "
                f"it lacks the trainable {missing[:3]} ({len(missing)}) and has the unknown "
                f"{unexpected[:3]} ({len(unexpected)})."
            )


@contextmanager
def _noted(engine: deepspeed.DeepSpeedEngine) -> Iterator[list[OSError]]:
    """Within, what DeepSpeed cannot write is noted and not raised: at its barriers the other ranks
    would wait for this one.
    """
    failed: list[OSError] = []

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **keywords: Any) -> Any:
            try:
                return write(*args, **keywords)
            except OSError as error:
                failed.append(error)
            except RuntimeError as error:  # of torch's own writer
                path = next(each for each in (*args, *keywords.values()) if isinstance(each, str))
                failed.append(_reason(path, error))

        return attempt

    writer = engine.checkpoint_engine
    replaced = (writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script")
    for owner, name in replaced:
        setattr(owner, name, noting(getattr(owner, name)))  # over the class's
    try:
        yield failed
    finally:
        for owner, name in replaced:
            delattr(owner, name)


def _reason(path: str, error: RuntimeError) -> OSError:
    """Why torch could not write a file. It says "unexpected pos" alone, so the system is asked to
    write some more there.
    """
    try:
        with open(path, "ab") as file:
            file.write(bytes(2**16))
    except OSError as reason:
        return OSError(reason.errno, reason.strerror, path)
    return OSError(errno.EIO, str(error).splitlines()[0], path)


# What each optimizer of DeepSpeed's asks for the gradient's norm, and how it is told "nan": then it
# makes no update, and empties every buffer of the step, offloaded ones too.
_NO_NORM: dict[str, Callable[[Tensor], Any]] = {
    "get_grads_for_norm": lambda nan: ([nan], {}),  # bf16 at ZeRO 1
    "_get_norm_groups": lambda nan: [nan],  # ZeRO 3
    "scaled_global_norm": lambda nan: nan,  # ZeRO 1 and 2
}


@contextmanager
def _no_norm(optimizer: Any) -> Iterator[None]:
    """Within, DeepSpeed finds a gradient that is not finite, whatever it is."""
    name = next(name for name in _NO_NORM if hasattr(optimizer, name))
    answer = _NO_NORM[name](torch.tensor(torch.nan, device=device()))
    setattr(optimizer, name, lambda *args, **keywords: answer)  # over the class's
    try:
        yield
    finally:
        delattr(optimizer, name)


# The only classes in DeepSpeed's own files beside tensors and plain data.
_EXPECTED_GLOBALS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def _refuse_nvme(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Raise ValueError for optimizer state on NVMe. DeepSpeed 0.19.8 loads such a checkpoint
    without an error, but with the base model's parameters.
    """
    if engine.zero_nvme_offload_optimizer() or (folder / "offloaded_tensors").exists():
        raise ValueError(
            f"{folder}: DeepSpeed does not read back the optimizer's state from NVMe "
            "(engine.offload.optimizer: nvme), so this "
            "run cannot be resumed. Start a new run in another `output`, with cpu in place of "
            "nvme. The checkpoint can still be exported."
        )


def _refuse(folder: Path, shards: int) -> None:
    """Raise ValueError for a checkpoint that is not whole, or could run code."""
    files = sorted(folder.glob("*.pt"))
    found = sum(
        "zero_pp_rank_" in file.name and file.name.endswith("_optim_states.pt") for file in files
    )
    if not files or found != shards:
        raise ValueError(
            f"{folder}: found {len(files)} DeepSpeed files (*.pt), {found} of them with optimizer "
            f"state, wanted that of {shards} processes: the checkpoint is not whole."
        )
    for file in files:
        if not is_zipfile(file):
            raise ValueError(
                f"{file}: found no zip archive, which torch.save writes. The file may be damaged, "
                "so it is refused."
            )
        foreign = sorted(
            set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _EXPECTED_GLOBALS
        )
        if foreign:
            raise ValueError(
                f"{file}: holds {foreign}, which DeepSpeed never writes and which could run code "
                "when loaded. "
                "Load checkpoints from sources you trust only; this one is refused."
            )
