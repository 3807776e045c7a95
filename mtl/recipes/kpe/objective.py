"""Three losses of the same rows: the answer, the masked words, the relation of head and tail."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.config import Config
from mtl.data.examples import Book
from mtl.losses.objective import Measure, ratio
from mtl.losses.terms import Terms
from mtl.recipes.kpe.examples import LOSSES, ChoiceBatch, ChoiceExamples

INPUTS = (
    "input_ids", "attention_mask", "knowledge", "knowledge_mask", "of", "seen", "at", "spans",
)  # fmt: skip


class KPE:
    """Its losses are `qa`, nats per example: which option is right; `span`, nats per masked token;
    `relation`, nats per item: which of the R relations holds, cosines over tau. The first is that
    of a task with rows; `of` makes tasks of the others.

    A row's item, its masks and the candidate beside which it is read are drawn anew in each step;
    in validation always the same.

    Args:
        tau: temperature of the relations' softmax.
        mask: share of a query item's tokens that are masked.
        knowledge: tokens of the longest knowledge text.

    Raises:
        ValueError: a keyword is out of range.
    """

    losses = LOSSES
    unit = "target"
    measures: Mapping[str, Measure] = {"accuracy": Measure(ratio)}

    def __init__(self, tau: float = 0.1, mask: float = 0.15, knowledge: int = 128):
        if not tau > 0:
            raise ValueError(f"tau: found {tau}, wanted more than 0.")
        if not 0 <= mask <= 1:
            raise ValueError(f"mask: found {mask}, wanted 0 to 1.")
        if not isinstance(knowledge, int) or knowledge < 2:
            raise ValueError(f"knowledge: found {knowledge}, wanted a whole number, 2 or more.")
        self.tau, self.mask, self.knowledge = tau, mask, knowledge

    def examples(self, book: Book, tokenizer: Any, config: Config) -> ChoiceExamples:
        return ChoiceExamples(book, tokenizer, config, self.mask, self.knowledge)

    def __call__(self, forward: Callable, batch: ChoiceBatch, k: int) -> Terms:
        scores, words, cosines = forward(**{name: getattr(batch, name) for name in INPUTS})
        table = scores_table(scores.float(), batch)
        losses = [
            F.cross_entropy(table, batch.answer, reduction="none"),
            F.cross_entropy(words.float(), batch.labels, reduction="none"),
            F.cross_entropy(cosines.float() / self.tau, batch.relation, reduction="none"),
        ]
        # One order for losses and tasks: answers, masked words, relations.
        terms = Terms.by_task(_cat(losses), torch.cat([batch.qa, batch.span, batch.relates]), k)
        right = Terms.by_task((table.argmax(1) == batch.answer).float(), batch.qa, k)
        measured = torch.stack([right.sums.double(), right.counts.double()], 1)
        return Terms(terms.sums, terms.counts, {}, {"accuracy": measured})


def scores_table(scores: Tensor, batch: ChoiceBatch) -> Tensor:
    """(B, most options) of (N,) scores; -inf where an example has no such option."""
    shape = len(batch.answer), int(batch.place.max()) + 1
    return scores.new_full(shape, float("-inf")).index_put((batch.example, batch.place), scores)


def _cat(losses: Sequence[Tensor]) -> Tensor:
    return torch.cat([loss.reshape(-1) for loss in losses])
