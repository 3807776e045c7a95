"""Token losses of a causal language model: its head on target positions only, in slices that never make all logits.

Full logits of R rows of L positions and their gradients are (R, L, V) several times over: the largest thing in a step at
today's vocabularies. The losses need them at the T target positions, and one slice of those at a time.

The head is whatever the model's own `forward` does to what its decoder answers (bias, scale, soft cap, LoRA, a tied table), so
it is run by that `forward`, with a stand-in where the decoder is: no modelling code is repeated here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def slice_rows(hidden: int) -> int:
    """Targets in a slice, for hidden states of that size: its logits are half as large as the head's weights.

    So they are small beside the head's gradient, and its gradient, added up slice by slice, costs little beside them.
    """
    return max(128, hidden // 2)


class Targets(NamedTuple):
    """What is to be predicted in a forward of (R, L) positions.

    Attributes:
        at: (T,) int64, ascending flat positions (row * L + column) that predict a target.
        labels: (T,) int64, the ids to predict there.
        most: the largest T of any rank in this forward: every rank cuts into as many slices, because at ZeRO 3 each of
            them gathers the head's weights.
    """

    at: Tensor
    labels: Tensor
    most: int


def decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The causal language model inside `model` (an adapter's, or itself), and its decoder's name in it.

    Raises:
        TypeError: it has no decoder apart from itself.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    name = next((name for name, part in causal.named_modules() if part is decoder), "")
    if not name:
        raise TypeError(f"{type(causal).__name__} has no decoder beside its head (`get_decoder()`)")
    return causal, name


def install(model: nn.Module) -> None:
    """Let `model.forward` take `targets=Targets(...)`: then `loss` in its outputs is (T,) float32, in nats, and `logits` None.

    Without `targets` it answers as before. The `forward` of this one object is wrapped, not its class's.

    The first slice is computed with the decoder; any further one is computed again in the backward pass, so that one slice's
    logits are held at a time. Padded or packed makes no difference here.

    Raises:
        TypeError: as `decoder_of`.
    """
    causal, name = decoder_of(model)
    plain = causal.forward

    @functools.wraps(plain)
    def forward(*args: Any, targets: Targets | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return plain(*args, **kwargs)
        decoder, answers = causal.get_submodule(name), []
        parts = max(1, -(-targets.most // slice_rows(causal.config.get_text_config().hidden_size)))
        labels = targets.labels.tensor_split(parts)

        def first(*args: Any, **kwargs: Any) -> Any:
            answer = decoder(*args, **kwargs)
            hidden = answer.last_hidden_state.flatten(0, 1).index_select(0, targets.at)  # (T, H)
            answers.append(answer)
            answers.extend(hidden.tensor_split(parts))
            return _with_hidden(answer, answers[1])

        def again(hidden: Tensor, labels: Tensor) -> Tensor:
            with _standing_in(causal, name, lambda *args, **kwargs: _with_hidden(answers[0], hidden)):
                return _token_losses(plain(*args, **kwargs).logits, labels)

        with _standing_in(causal, name, first):
            outputs = plain(*args, **kwargs)
        losses = [_token_losses(outputs.logits, labels[0])]
        for part in zip(answers[2:], labels[1:], strict=True):
            losses.append(checkpoint(again, *part, use_reentrant=False))
        outputs.loss, outputs.logits = torch.cat(losses), None
        return outputs

    causal.forward = forward


class _StandIn(nn.Module):
    """Called, it answers; asked for anything else, it is the decoder. It holds no parameters."""

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any]):
        super().__init__()
        self.forward = answer
        self.__dict__["_decoder"] = decoder  # not as a part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)


@contextmanager
def _standing_in(causal: nn.Module, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    """Within this context calls of the decoder are answered by `answer`."""
    path, _, last = name.rpartition(".")
    parent = causal.get_submodule(path)
    decoder = getattr(parent, last)
    setattr(parent, last, _StandIn(decoder, answer))
    try:
        yield
    finally:
        setattr(parent, last, decoder)


def _with_hidden(answer: Any, hidden: Tensor) -> Any:
    """A decoder's answer with other hidden states, (n, H), as one row."""
    return type(answer)(**{**answer, "last_hidden_state": hidden[None]})


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) float32 cross-entropy in nats, from logits (1, n, V) of any float dtype."""
    return F.cross_entropy(logits[0].float(), labels, reduction="none")
