"""Whether a model keeps packed sequences apart. We measure it at the start, because some
architectures leak silently.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl.config import Config, ConfigError
from mtl.config.schema import takes_one_row
from mtl.data.collate import collate
from mtl.distributed import comm
from mtl.distributed.engine import Engine

LENGTHS = (5, 9, 7)
# Relative to the largest logit. In bf16 rounding alone makes a sequence differ in another shape
# (4 % in SmolLM2-135M). So this catches wrong positions only; LEAK catches leaks.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}
# Same shapes, same kernels: another first sequence must not change the later ones, in any dtype.
LEAK = 1e-5


@dataclass(frozen=True)
class Isolation:
    """How far packed logits are from the right ones, relative to the largest logit.

    Attributes:
        apart: three sequences packed in a row, against each in its own row.
        leak: how the later sequences' logits change when the first sequence has other tokens.
        tolerance: the largest `apart` allowed in the model's dtype.
    """

    apart: float
    leak: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.apart <= self.tolerance and self.leak <= LEAK


def measure(engine: Engine, vocabulary: int, rows: int = 2) -> Isolation:
    """Run three short random sequences packed and apart, in eval mode. A collective.

    Args:
        vocabulary: token ids to draw from.
        rows: of the packed batch, all alike. Some kernels keep sequences apart in one row only.
    """
    # A fixed seed: every rank measures the same sequences.
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(vocabulary, size=n) for n in LENGTHS)
    other = (first + 1) % vocabulary
    engine.eval()
    with torch.no_grad():
        packed = _logits(engine, [first, second, third], rows)
        changed = _logits(engine, [other, second, third], rows)
        # In the order of the packed row, so that positions can be compared one by one.
        apart = torch.cat([_logits(engine, [ids]) for ids in (first, second, third)])
    scale = apart.abs().max()
    later = slice(LENGTHS[0], None)
    parameters = list(engine.module.parameters())
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    if not all(
        p.is_floating_point() for p in parameters
    ):  # quantized: products are in bf16, whatever the other weights' dtype
        dtype = torch.bfloat16
    return Isolation(
        apart=float((packed - apart).abs().max() / scale),
        leak=float((packed[later] - changed[later]).abs().max() / scale),
        tolerance=TOLERANCE[dtype],
    )


def decide(config: Config, engine: Engine, vocabulary: int, say: Callable[[str], None]) -> bool:
    """Whether this run packs, as `batch.packing` says; "auto" packs where the model is measured to
    keep sequences apart.

    Raises:
        ConfigError: packing is asked for and the model leaks.
    """
    wanted = config.batch.packing
    if wanted is False:
        return False
    # As many rows as the run's micro-batches may have: see `layouts_for`.
    found = measure(engine, vocabulary, rows=1 if takes_one_row(config.model.attention) else 2)
    # Ranks on different hardware may measure a borderline case differently, but all must decide
    # alike.
    holds = not comm.sum_(torch.tensor([float(not found.holds)])).item()
    figures = (
        f"packed differs from apart by {found.apart:.1e}, leak {found.leak:.1e} (of the "
        "largest logit)"
    )
    name = type(engine.module).__name__
    if not holds and wanted is True:
        hint = f"{name} lets packed sequences see each other: {figures}."
        raise ConfigError([config.error("batch.packing", "true", "auto or false", hint)])
    say(
        f"batches are packed: {figures}"
        if holds
        else f"batches are padded, because {name} does not isolate: {figures}"
    )
    return holds


def _logits(engine: Engine, sequences: list[np.ndarray], rows: int = 1) -> Tensor:
    """(sum of lengths, vocabulary) float32: the sequences packed into one row, without autocast.
    The batch has that row so many times.
    """
    # Each gets one more token at its end, because `collate` drops a row's last token.
    row = [(np.append(ids, 0), np.zeros(len(ids) + 1, dtype=bool), 0) for ids in sequences]
    batch = collate([row] * rows, pad_id=0, packed=True).to(engine.device)
    logits = engine.module(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits
    return logits[0].float()
