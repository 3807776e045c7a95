"""Token losses of a causal language model: its head runs on target positions only, in slices.

Full logits of R rows of L positions and their gradients are (R, L, V) several times over. At
today's vocabularies they are the largest thing in a step. The losses need them at the T target
positions only, one slice of these at a time.

The head is whatever the model's own `forward` does to its decoder's output: bias, scale, soft cap,
LoRA, a tied table. So that `forward` runs it, with a stand-in for the decoder. No modelling code is
repeated here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl.data.collate import Teacher
from mtl.losses import teacher


def slice_rows(hidden: int) -> int:
    """Targets in a slice, for hidden states of that size: its logits are half as large as the
    head's weights.

    So the logits are small beside the head's gradient, and adding up that gradient slice by slice
    costs little.
    """
    return max(128, hidden // 2)


class Targets(NamedTuple):
    """What a forward of (R, L) positions predicts.

    Attributes:
        at: (T,) int64, ascending flat positions (row * L + column) that predict a target.
        labels: (T,) int64, the ids to predict there.
        most: the largest T of any rank in this forward. Every rank makes as many slices, because at
            ZeRO 3 each slice gathers the head's weights.
        teacher: of targets whose loss is the divergence from a teacher, not the cross-entropy.
            None: there are none.
    """

    at: Tensor
    labels: Tensor
    most: int
    teacher: Teacher | None = None


def decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The causal language model inside `model` (an adapter's base, or itself), and its decoder's
    name.

    Raises:
        TypeError: it has no decoder of its own.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    name = next((name for name, part in causal.named_modules() if part is decoder), "")
    if not name:
        raise TypeError(f"{type(causal).__name__} has no decoder beside its head (`get_decoder()`)")
    return causal, name


def install(model: nn.Module, kernel: str | None = None) -> None:
    """Let `model.forward` take `targets=Targets(...)`. Then its outputs have `loss`, (T,) float32
    in nats, and `logits` None.

    With `summarize=True` beside it there is no loss, and `logits` is (ids, log_p), what
    `teacher.summary` keeps of the T distributions.

    Without `targets` it answers as before. We wrap the `forward` of this one object, not its
    class's.

    The first slice is computed with the decoder. Each further slice is computed again in the
    backward pass, so that one slice's logits are held at a time. Padded and packed rows are treated
    alike.

    Args:
        kernel: "liger" or "torch": a fused linear cross-entropy in place of slices. It only
            multiplies: the first forward raises ValueError if the model's head does more (a scale,
            a soft cap).

    Raises:
        TypeError: as `decoder_of`; or a kernel is asked for and the head is no plain linear module.
    """
    causal, name = decoder_of(model)
    plain = causal.forward
    sliced = functools.partial(_sliced, causal, name)
    fused = _Fused(causal, name, kernel) if kernel else None

    @functools.wraps(plain)
    def forward(
        *args: Any, targets: Targets | None = None, summarize: bool = False, **kwargs: Any
    ) -> Any:
        run = functools.partial(plain, *args, **kwargs)
        if targets is None:
            return run()
        if summarize:
            outputs, kept = sliced(run, targets, _summary)
            outputs.loss, outputs.logits = None, kept
            return outputs
        outputs, losses = fused(run, targets) if fused else sliced(run, targets)
        outputs.loss, outputs.logits = losses, None
        return outputs

    causal.forward = forward


def _sliced(
    causal: nn.Module,
    name: str,
    run: Callable[[], Any],
    targets: Targets,
    take: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """The outputs of `run`, the model's own forward, for the first slice; and what `take` makes of
    all slices, put together: (T,) losses.

    Args:
        take: from a slice's logits (1, n, V) and what belongs to its n targets to a tensor, or a
            tuple of them, with n rows. None: losses.
    """
    decoder, answers = causal.get_submodule(name), []
    # By the largest T of all ranks, not this one's: ZeRO 3 gathers in every slice.
    parts = max(1, -(-targets.most // slice_rows(causal.config.get_text_config().hidden_size)))
    take = take or _token_losses
    of_targets = (targets.labels, *(targets.teacher or ()))
    mine, *others = zip(*(of.tensor_split(parts) for of in of_targets), strict=True)

    # answers: the decoder's answer, then the hidden states of every slice.
    def first(*args: Any, **kwargs: Any) -> Any:
        answer = decoder(*args, **kwargs)
        answers.append(answer)
        answers.extend(_at(answer, targets).tensor_split(parts))
        return _with_hidden(answer, answers[1])

    def again(hidden: Tensor, *mine: Tensor) -> Any:
        with _standing_in(causal, name, lambda *args, **kwargs: _with_hidden(answers[0], hidden)):
            return take(run().logits, *mine)

    with _standing_in(causal, name, first):
        outputs = run()
    found = [take(outputs.logits, *mine)]
    for hidden, mine in zip(answers[2:], others, strict=True):
        found.append(checkpoint(again, hidden, *mine, use_reentrant=False))
    if isinstance(found[0], Tensor):
        return outputs, torch.cat(found)
    return outputs, tuple(torch.cat(of) for of in zip(*found, strict=True))


def linear_head(causal: nn.Module) -> nn.Linear:
    """The linear head of a causal language model. Raises TypeError if it is another module or has
    an adapter.
    """
    found = causal.get_output_embeddings()
    # Not isinstance: a subclass or an adapter does more than multiply by `weight`.
    if type(found) is not nn.Linear:
        raise TypeError(
            f"{type(causal).__name__}'s head is a {type(found).__name__}, wanted a plain linear "
            "module for the fused kernel"
        )
    return found


def _liger(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import functional  # here: an extra

    sums = {"reduction": "none", "accum_dtype": torch.float32}
    return functional.liger_fused_linear_cross_entropy(
        hidden, head.weight, labels, head.bias, **sums
    )


def _torch(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        hidden, head.weight, labels, linear_bias=head.bias, reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),  # None would make all logits at once
    )  # fmt: skip


KERNELS = {"liger": _liger, "torch": _torch}


class _Fused:
    """The same as `_sliced` with a fused head and cross-entropy: no logits in memory."""

    def __init__(self, causal: nn.Module, name: str, kernel: str):
        self._kernel, self._what = KERNELS[kernel], kernel
        self._causal, self._name, self._is_checked = causal, name, False
        linear_head(causal)

    def __call__(self, run: Callable[[], Any], targets: Targets) -> tuple[Any, Tensor]:
        # A teacher's divergence needs logits, which the kernel never makes.
        if not len(targets.at) or targets.teacher is not None:
            return _sliced(self._causal, self._name, run, targets)
        decoder, answers = self._causal.get_submodule(self._name), []

        def one(*args: Any, **kwargs: Any) -> Any:
            answer = decoder(*args, **kwargs)
            answers.extend([answer, _at(answer, targets)])
            return _with_hidden(
                answer, answers[1][:1]
            )  # the rest of the forward, such as a router's loss, is wanted too

        with _standing_in(self._causal, self._name, one):
            outputs = run()
        answer, hidden = answers
        if not self._is_checked:
            # 16 times as large, so that a soft cap shows.
            self._check(run, answer, 16 * hidden[:1].detach())
            self._is_checked = True
        losses = self._kernel(hidden, linear_head(self._causal), targets.labels)
        return outputs, losses.float()

    def _check(self, run: Callable[[], Any], answer: Any, large: Tensor) -> None:
        """Raise ValueError if the model's own code and its head alone make different logits of
        large hidden states.
        """
        with (
            torch.no_grad(),
            _standing_in(
                self._causal, self._name, lambda *args, **kwargs: _with_hidden(answer, large)
            ),
        ):
            logits, wanted = run().logits[0].float(), linear_head(self._causal)(large).float()
        if not torch.allclose(logits, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            raise ValueError(
                f"model.loss_kernel: {self._what}: {type(self._causal).__name__} scales or caps "
                "its logits, which the kernel would leave out. Leave the key out: the head then "
                "runs in slices, with the model's own code."
            )


class _StandIn(nn.Module):
    """A stand-in for the decoder. A call returns its answer; any attribute is the decoder's. It
    holds no parameters.
    """

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any]):
        super().__init__()
        self.forward = answer
        self.__dict__["_decoder"] = decoder  # not as a part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)


@contextmanager
def _standing_in(causal: nn.Module, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    """Within this context `answer` answers calls of the decoder."""
    path, _, last = name.rpartition(".")
    parent = causal.get_submodule(path)
    decoder = getattr(parent, last)
    setattr(parent, last, _StandIn(decoder, answer))
    try:
        yield
    finally:
        setattr(parent, last, decoder)


def _at(answer: Any, targets: Targets) -> Tensor:
    """(T, H): a decoder's hidden states at the positions that predict a target."""
    return answer.last_hidden_state.flatten(0, 1).index_select(0, targets.at)


def _with_hidden(answer: Any, hidden: Tensor) -> Any:
    """A decoder's answer with other hidden states (n, H), as one row."""
    # A new one, as the other slices need the decoder's own answer.
    return type(answer)(**{**answer, "last_hidden_state": hidden[None]})


def _token_losses(logits: Tensor, labels: Tensor, *taught: Tensor) -> Tensor:
    """(n,) float32 in nats, from logits (1, n, V) of any float dtype: cross-entropy, or where there
    is a teacher the divergence from it.
    """
    logits = logits[0].float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    if not taught:
        return losses
    has, ids, log_p = taught
    return torch.where(has, teacher.divergence(logits, ids, log_p), losses)


def _summary(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return teacher.summary(logits[0].float())
