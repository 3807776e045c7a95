"""How much memory a rank needs, from shapes alone: exact about parameters and their state, rough
about the rest.

What is held follows the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 3) and,
where DeepSpeed 0.19.8 differs, what was counted in its engine: it keeps an fp32 master copy of what
is trained at stages 1-3 even if the model is fp32, hands an offloaded optimizer a second copy of
the gradients, and allocates its communication buckets whole.
"""

from dataclasses import dataclass

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
        rough: whether it is an estimate rather than a count.
        note: how it comes about.
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
    stored = stored_bytes(model, config.model.quantize)
    parameters = [
        (p.numel(), stored.get(name, p.element_size()), p.requires_grad)
        for name, p in model.named_parameters()
    ]
    total, trained = sum(n for n, _, _ in parameters), sum(n for n, _, grad in parameters if grad)
    weights = sum(n * size for n, size, _ in parameters)
    bf16, offload = config.model.precision == "bf16", config.engine.offload

    def share(stages: int) -> int:
        """Into how many parts something is cut that ZeRO cuts from stage `stages` on."""
        return world if stage >= stages else 1

    moments = {"adamw": 2, "sgd": 1 if config.optimizer.momentum else 0}[config.optimizer.name]
    master = 4 * trained / world if stage else 0
    on_optimizer = "device" if offload.optimizer == "none" else offload.optimizer
    on_parameters = "device" if offload.parameters == "none" else offload.parameters
    on_gradients = "cpu" if stage == 3 and offload.optimizer != "none" else "device"
    copies = ["fp32 master weights"] * bool(master) + [f"{moments} moments in fp32"] * bool(moments)
    parts = [
        Part(
            "weights",
            weights / share(3),
            on_parameters,
            note=f"{total:,} parameters{_over(share(3))}",
        ),
        Part(
            "gradients",
            4 * trained / share(2),
            on_gradients,
            note=f"{trained:,} trained, accumulated in fp32{_over(share(2))}",
        ),
        Part(
            "optimizer",
            master + 4 * moments * trained / share(1),
            on_optimizer,
            note=f"{' and '.join(copies) or 'no state'}{_over(share(1))}",
        ),
    ]
    if config.average:
        given, held = config.average, config.average.last or 1
        copies = held + (held > 1)  # their mean, while it is measured
        note = f"{copies} x {trained:,} in fp32{_over(share(1))}"
        parts.append(
            Part(
                "average", 4 * copies * trained / share(1), given.device or on_optimizer, note=note
            )
        )
    if offload.optimizer != "none":
        size, what = 4 * trained / world, "the optimizer's gradients"
        if (
            stage < 3
            # new weights wait there as well, and a parameter at a time passes through a buffer on
            # either side
        ):
            element, largest = (
                (2 if bf16 else 4),
                max((n for n, _, grad in parameters if grad), default=0),
            )
            size, what = (
                size + element * (trained / world + largest),
                f"{what}, and new weights on their way back",
            )
            parts.append(
                Part(
                    "buffer",
                    element * largest,
                    note="the largest parameter, on its way to the optimizer",
                )
            )
        parts.append(Part("transfers", size, on_optimizer, note=f"{what}{_over(world)}"))
    elif bf16 and stage == 1:
        parts.append(
            Part(
                "bf16 gradients",
                2 * trained,
                note="of the micro-batch, before they are accumulated",
                rough=True,
            )
        )
    if stage and world > 1:
        bucket = config.engine.deepspeed.get("zero_optimization", {}).get(
            "reduce_bucket_size", BUCKET
        )
        bucket = BUCKET if bucket == "auto" else bucket
        buffers = 1 if stage == 3 else 2  # one is filled while the other is reduced
        note = (
            f"{buffers} x zero_optimization.reduce_bucket_size of {bucket:,.0f} in fp32 on an "
            "accelerator"
        )
        parts.append(Part("communication", 4 * buffers * bucket, rough=True, note=note))
    return [*parts, *_activations(config, model, positions, targets)]


def _activations(config: Config, model: nn.Module, positions: int, targets: int) -> list[Part]:
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


def _over(parts: int) -> str:
    return f" / {parts} ranks" if parts > 1 else ""
