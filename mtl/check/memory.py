"""How much memory a rank needs, from shapes alone: exact for parameters and their state, rough for
the rest.

The parts follow the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 3). DeepSpeed
0.19.8 differs, as counted in its engine. At stages 1-3 it keeps an fp32 master copy of trained
parameters even if the model is fp32. It gives an offloaded optimizer a second copy of gradients. It
allocates its communication buckets whole.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from mtl.config import Config
from mtl.losses.head import slice_rows
from mtl.models.quantize import stored_bytes

BUCKET = 500_000_000  # elements, DeepSpeed's default `zero_optimization.reduce_bucket_size`
HOST = ("cpu", "nvme")


@dataclass(frozen=True)
class Part:
    """A line of the estimate.

    Attributes:
        bytes: of one rank.
        where: "device", "cpu" or "nvme".
        rough: whether it is an estimate and not a count.
        note: how it is computed.
    """

    name: str
    bytes: float
    where: str = "device"
    rough: bool = False
    note: str = ""


def estimate(
    config: Config, stage: int, model: nn.Module, world: int, positions: int, targets: int
) -> list[Part]:
    """What one rank holds at the peak of a training step.

    Args:
        stage: the ZeRO stage in force.
        model: with its adapters; the meta device will do.
        world: data-parallel ranks.
        positions: token positions of the largest micro-batch.
        targets: target tokens of the micro-batch that has most.
    """
    rank = _Rank(config, stage, world, _parameters(model, config))
    return [
        *_held(rank),
        *_averaged(rank),
        *_offloading(rank),
        *_half_gradients(rank),
        *_communication(rank),
        *_activations(config, model, positions, targets),
    ]


class _Parameter(NamedTuple):
    numel: int
    size: float  # bytes of an element as it is stored
    trained: bool


@dataclass(frozen=True)
class _Rank:
    """What the lines of one rank are computed from."""

    config: Config
    stage: int
    world: int
    parameters: list[_Parameter]

    @property
    def trained(self) -> int:
        return sum(p.numel for p in self.parameters if p.trained)

    @property
    def largest(self) -> int:
        return max((p.numel for p in self.parameters if p.trained), default=0)

    @property
    def element(self) -> int:
        """Bytes of an element of the weights that are trained."""
        return 2 if self.config.model.precision == "bf16" else 4

    def share(self, stages: int) -> int:
        """Into how many parts something is divided that ZeRO partitions from stage `stages` on."""
        return self.world if self.stage >= stages else 1


def _parameters(model: nn.Module, config: Config) -> list[_Parameter]:
    stored = stored_bytes(model, config.model.quantize)
    return [
        _Parameter(p.numel(), stored.get(name, p.element_size()), p.requires_grad)
        for name, p in model.named_parameters()
    ]


def _held(rank: _Rank) -> list[Part]:
    """Weights, gradients and the optimizer's state: what the whole step holds."""
    offload, optimizer, trained = rank.config.engine.offload, rank.config.optimizer, rank.trained
    total = sum(p.numel for p in rank.parameters)
    weights = sum(p.numel * p.size for p in rank.parameters)
    moments = {"adamw": 2, "sgd": 1 if optimizer.momentum else 0}[optimizer.name]
    master = 4 * trained / rank.world if rank.stage else 0
    copies = ["fp32 master weights"] * bool(master) + [f"{moments} moments in fp32"] * bool(moments)
    on_gradients = "cpu" if rank.stage == 3 and offload.optimizer != "none" else "device"
    return [
        Part(
            "weights",
            weights / rank.share(3),
            _where(offload.parameters),
            note=f"{total:,} parameters{_over(rank.share(3))}",
        ),
        Part(
            "gradients",
            4 * trained / rank.share(2),
            on_gradients,
            note=f"{trained:,} trained, accumulated in fp32{_over(rank.share(2))}",
        ),
        Part(
            "optimizer",
            master + 4 * moments * trained / rank.share(1),
            _where(offload.optimizer),
            note=f"{' and '.join(copies) or 'no state'}{_over(rank.share(1))}",
        ),
    ]


def _averaged(rank: _Rank) -> list[Part]:
    """The average of the trained weights, and what measuring it takes."""
    given = rank.config.average
    if given is None:
        return []
    held = given.last or 1
    copies = held + (held > 1)  # their mean, while it is measured
    place = given.device or _where(rank.config.engine.offload.optimizer)
    note = f"{copies} x {rank.trained:,} in fp32{_over(rank.share(1))}"
    return [Part("average", 4 * copies * rank.trained / rank.share(1), place, note=note)]


def _offloading(rank: _Rank) -> list[Part]:
    """What an optimizer on the host needs to be fed."""
    place = _where(rank.config.engine.offload.optimizer)
    if place == "device":
        return []
    gradients, note = 4 * rank.trained / rank.world, "the optimizer's gradients"
    if rank.stage == 3:
        return [Part("transfers", gradients, place, note=f"{note}{_over(rank.world)}")]
    # New weights wait there as well, and a parameter at a time passes through a buffer on either
    # side.
    size = gradients + rank.element * (rank.trained / rank.world + rank.largest)
    note = f"{note}, and new weights on their way back{_over(rank.world)}"
    passing = "the largest parameter, on its way to the optimizer"
    return [
        Part("buffer", rank.element * rank.largest, note=passing),
        Part("transfers", size, place, note=note),
    ]


def _half_gradients(rank: _Rank) -> list[Part]:
    offload = rank.config.engine.offload.optimizer
    if offload != "none" or rank.stage != 1 or rank.config.model.precision != "bf16":
        return []
    note = "of the micro-batch, before they are accumulated"
    return [Part("bf16 gradients", 2 * rank.trained, note=note, rough=True)]


def _communication(rank: _Rank) -> list[Part]:
    if not rank.stage or rank.world == 1:
        return []
    zero = rank.config.engine.deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size", BUCKET)
    bucket = BUCKET if bucket == "auto" else bucket
    buffers = 1 if rank.stage == 3 else 2  # one is filled while the other is reduced
    note = (
        f"{buffers} x zero_optimization.reduce_bucket_size of {bucket:,.0f} in fp32 on an "
        "accelerator"
    )
    return [Part("communication", 4 * buffers * bucket, rough=True, note=note)]


def _activations(config: Config, model: nn.Module, positions: int, targets: int) -> list[Part]:
    if not isinstance(getattr(model, "config", None), PretrainedConfig):
        note = "unknown: the model has no configuration of transformers'"
        return [Part("activations", 0, rough=True, note=note)]
    settings: PretrainedConfig = model.config.get_text_config()
    size = 4 if config.model.precision == "fp32" else 2
    hidden, layers, vocabulary = (
        settings.hidden_size,
        settings.num_hidden_layers,
        settings.vocab_size,
    )
    inner = getattr(settings, "intermediate_size", None) or 4 * hidden
    inner *= getattr(settings, "num_experts_per_tok", None) or 1
    # Inputs and outputs of two norms, of attention's and the block's products, and the residual
    # stream; an MLP with a gate.
    layer = positions * size * (10 * hidden + 4 * inner)
    checkpointed = config.model.activation_checkpointing
    blocks = layers * positions * size * hidden + layer if checkpointed else layers * layer
    note = f"{layers} layers of {hidden}, {positions:,} positions" + ", recomputed" * checkpointed
    targets = min(targets, slice_rows(hidden))
    head = (
        f"{targets:,} targets x {vocabulary:,}: logits of a slice, their fp32 log-softmax and "
        "its gradient"
    )
    return [
        Part("activations", blocks, rough=True, note=note),
        Part("logits", targets * vocabulary * (size + 4 + 4), rough=True, note=head),
    ]


def table(parts: list[Part]) -> list[str]:
    """The estimate for people, in GiB, with a total for each place."""
    lines = []
    for part in parts:
        place = (
            ""
            if part.where == "device"
            else f" [in {part.where} memory]"
            if part.where == "cpu"
            else " [on nvme]"
        )
        lines.append(
            f"{part.name:14}{'~' if part.rough else ' '}{gib(part.bytes):>10}  {part.note}{place}"
        )
    for where in ("device", *HOST):
        if found := [part.bytes for part in parts if part.where == where]:
            lines.append(
                f"{'total, ' + where:14}~{gib(sum(found)):>10}  lines with ~ are rough; kernels "
                "and fragmentation add to it"
            )
    return lines


def gib(amount: float) -> str:
    """Bytes for people."""
    return f"{amount / 2**30:,.2f} GiB" if amount >= 2**27 else f"{amount / 2**20:,.1f} MiB"


def _where(offload: str) -> str:
    """The place that an `engine.offload` setting means."""
    return "device" if offload == "none" else offload


def _over(parts: int) -> str:
    return f" / {parts} ranks" if parts > 1 else ""
