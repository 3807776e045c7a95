"""Preference losses: a pair of answers to one prompt, of which one is better.

With log pi(y|x) the sum of an answer's token log-probabilities, ref the starting model, and
s(y) = log pi(y|x) - log ref(y|x), the loss of a pair is one of

    sigmoid   -log sigma(b (s_c - s_r))          DPO, arXiv 2305.18290, eq. 7. With label_smoothing
                                                 e conservative DPO: 1-e of it, e of its reverse
    robust    ((1-e) l(d) - e l(-d)) / (1-2e)    rDPO, arXiv 2403.00409; l the sigmoid loss
    hinge     max(0, 1 - b (s_c - s_r))          SLiC, arXiv 2305.10425
    ipo       (s_c - s_r - 1/(2b))^2             arXiv 2310.12036, eq. 17; s a mean over tokens
    apo_zero  1 - sigma(b s_c) + sigma(b s_r)    arXiv 2408.06266, eq. 7
    orpo      nll_c - b log sigma(o_c - o_r)     arXiv 2403.07691, eq. 6-7; o the log odds of s, the
                                                 mean log-probability; nll_c = -s_c
    simpo     -log sigma(b (s_c - s_r) - gamma)  arXiv 2405.14734, eq. 6; s that mean

The last two have no reference. All losses are per pair, so a task's loss is the mean over its
pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.config import Config, ConfigError
from mtl.config.words import did_you_mean, either
from mtl.data.collate import MicroBatch, collate
from mtl.data.encode import Encoder, tokenizer_fingerprint
from mtl.data.encoded import answer
from mtl.data.examples import LOSS, Book, Piece, Row
from mtl.data.formats import Messages, Pair, RowProblem
from mtl.data.marks import marked
from mtl.data.special import Note
from mtl.losses.head import Targets
from mtl.losses.objective import Measure, ratio
from mtl.losses.terms import Terms

SFT = "sft"
WITH_REFERENCE = "sigmoid", "ipo", "hinge", "robust", "apo_zero"
WITHOUT = "orpo", "simpo"
NORMALIZED = "ipo", *WITHOUT  # by definition
SMOOTHED = "sigmoid", "robust", "simpo"


@dataclass(frozen=True)
class PairBatch(MicroBatch):
    """B pairs: a MicroBatch of 2 B sequences, number 2 i the chosen side of pair i, 2 i + 1 its
    rejected one. `task` holds each target's sequence.

    Attributes:
        pair: (B,) int64, the task of each pair's loss.
        sft: (B,) int64, the task of its chosen side's token loss; -1: none.
        reference: (B, 2) float32, log-probabilities that the starting model gives the two answers;
            zeros where unknown.
    """

    pair: Tensor
    sft: Tensor
    reference: Tensor

    def counts(self, k: int) -> Tensor:
        """(k,) int64: pairs of each task, or target tokens of the chosen sides."""
        tokens = torch.bincount(self.task, minlength=2 * len(self.pair))[::2]
        found = _by_task(torch.ones_like(self.pair), self.pair, k) + _by_task(tokens, self.sft, k)
        return found * 0 if self.is_dummy else found


class PairExamples:
    """Columns of a pair: `chosen`, `rejected`, the sides' ids (n,) int32 with the prompt;
    `chosen_target`, `rejected_target` (n,) uint8, 1 on the answer's tokens.
    """

    packs = True
    makes_dummies = False
    notes = True
    unit = "pair"
    text_column = "chosen"
    losses = (LOSS, SFT)
    columns: Mapping[str, pa.DataType] = {
        "chosen": pa.int32(), "rejected": pa.int32(),
        "chosen_target": pa.uint8(), "rejected_target": pa.uint8(),
    }  # fmt: skip

    def __init__(self, book: Book, tokenizer: Any, config: Config):
        self.book, self.tokenizer = book, tokenizer
        self.max_length, self.too_long = config.batch.max_length, config.batch.too_long
        longest, evaluated = 2 * (self.max_length - 1), config.evaluate.tokens
        if longest > config.batch.tokens:
            wanted = f"half of batch.tokens, {config.batch.tokens}, at most: a pair has two sides"
            raise ConfigError([config.error("batch.max_length", str(self.max_length), wanted)])
        if evaluated is not None and longest > evaluated:
            wanted = f"at least {longest}: a pair has two sides of up to batch.max_length tokens"
            raise ConfigError([config.error("evaluate.tokens", str(evaluated), wanted)])
        special_text = config.batch.special_text
        self.encoder = Encoder(tokenizer, self.max_length, self.too_long, special_text)
        self.pad_id = tokenizer.pad_token_id or 0
        self.gathers = config.engine.zero == 3

    @property
    def identity(self) -> Any:
        length = [self.max_length, self.too_long == "truncate"]
        return [tokenizer_fingerprint(self.tokenizer), length, self.encoder.specials.policy]

    def encode(self, example: Any, note: Note = lambda text, times: None) -> Row:
        if not isinstance(example, Pair):
            found = type(example).__name__
            raise RowProblem("bad value", f"found a {found}, wanted a pair (format: preference)")
        columns: dict[str, np.ndarray] = {}
        truncated = False
        said: dict[str, int] = {}  # once a row, though both sides have the prompt
        for name in ("chosen", "rejected"):
            try:
                ids, target, cut = self._side(
                    getattr(example, name), example.shared, said.__setitem__
                )
            except RowProblem as problem:
                raise RowProblem(problem.reason, f"{name}: {problem}") from problem
            columns |= {name: ids, f"{name}_target": target.astype(np.uint8)}
            truncated |= cut
        for text, times in said.items():
            note(text, times)
        if np.array_equal(columns["chosen"], columns["rejected"]):
            found = f"found both sides alike in {len(columns['chosen'])} tokens"
            raise RowProblem("equal sides", f"{found}, wanted two answers")
        target = columns["chosen_target"] > 0
        counts = 1, int(target.sum())
        return Row(columns, counts, answer(columns["chosen"][target]), truncated)

    def _side(self, example: Any, shared: int, note: Note) -> tuple[np.ndarray, np.ndarray, bool]:
        """A side's tokens. Targets are those of the turns after the first `shared`."""
        ids, target, cut = self.encoder(example, note)
        prompt = getattr(example, "messages", [])[:shared]
        if any(turn["role"] == "assistant" for turn in prompt):
            before = self.encoder(Messages(prompt, example.tools)).ids
            if not np.array_equal(ids[: len(before)], before):
                found = "the chat template changes the prompt's turns once an answer follows"
                raise RowProblem("template", f"{found}. Use another one (model.chat_template)")
            target[: len(before)] = False
            if not target.any():
                raise RowProblem("no target", f"{len(ids)} tokens leave nothing of the answer")
        return ids, target, cut

    def positions(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        return 2 * (np.maximum(lengths["chosen"], lengths["rejected"]) - 1)  # two padded rows

    def collate(
        self, rows: Sequence[Sequence[Piece]], *, packed: bool, most: int, tokens: int
    ) -> PairBatch:
        pieces = [piece for row in rows for piece in row]
        numbers, laid = iter(range(len(pieces))), []
        for row in rows:
            sequences = [side for piece in row for side in _sides(piece, next(numbers))]
            laid += [sequences] if packed else [[one] for one in sequences]
        # At ZeRO 3 all ranks make as many slices of their targets. `most` counts pairs. This rank
        # knows only that another's targets are no more than a micro-batch's positions.
        made = collate(laid, self.pad_id, packed, tokens if self.gathers else 0, tokens)
        tasks = [[self.book.task(loss, p.stream) for p in pieces] for loss in self.losses]
        unknown = np.zeros(2, np.float32)
        known = np.stack([piece.columns.get("reference", unknown) for piece in pieces])
        return PairBatch(
            **{field.name: getattr(made, field.name) for field in fields(made)},
            pair=torch.tensor(tasks[0]),
            sft=torch.tensor(tasks[1]),
            reference=torch.from_numpy(known),
        )

    def show(self, columns: Mapping[str, np.ndarray], color: bool) -> str:
        each = [
            marked(self.tokenizer, columns[name], columns[f"{name}_target"] > 0, color)
            for name in ("chosen", "rejected")
        ]
        return f"chosen: {each[0]}\nrejected: {each[1]}"

    def settle(self, splits: Mapping[int, Any]) -> None:
        pass


class Preference:
    """Preference losses of pairs, against the starting model or without a reference.

    It has two losses: `loss`, of pairs, and `sft`, the chosen sides' token loss in nats per target
    token. With `of`, `sft` is a task of its own. Rewards are beta times what the loss compares: s
    above.

    Args:
        loss: one of those above.
        beta: how strongly answers are pulled apart, > 0; orpo: the odds ratio's weight.
        label_smoothing: presumed share of pairs whose sides are swapped. For sigmoid and simpo 0 to
            0.5, for robust below 0.5.
        length_normalized: whether log-probabilities are means over the answer's tokens, not sums.
            ipo, orpo and simpo always take means.
        gamma: simpo's margin between rewards; None: 0.5.

    Raises:
        ValueError: a keyword is out of range, or has no meaning for this loss.
    """

    losses = PairExamples.losses
    unit = PairExamples.unit
    measures: Mapping[str, Measure] = {
        "reward_accuracy": Measure(ratio),
        "reward_margin": Measure(ratio),
        "chosen_reward": Measure(ratio),
        "rejected_reward": Measure(ratio, highest=False),
    }

    def __init__(
        self,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
        gamma: float | None = None,
    ):
        names = [*WITH_REFERENCE, *WITHOUT]
        if loss not in names:
            hint = did_you_mean(loss, names)
            raise ValueError(f"loss: found {loss!r}, wanted {either(names)}. {hint}".rstrip())
        if not beta > 0:
            raise ValueError(f"beta: found {beta}, wanted more than 0.")
        top = 0.0 if loss not in SMOOTHED else 0.5
        if not 0 <= label_smoothing <= top or (loss == "robust" and label_smoothing == top):
            wanted = "0" if not top else "0 to 0.5" + ", less than 0.5" * (loss == "robust")
            raise ValueError(
                f"label_smoothing: found {label_smoothing}, wanted {wanted} (loss: {loss})."
            )
        if gamma is not None and loss != "simpo":
            raise ValueError(f"gamma: found {gamma}, wanted none: only simpo has it, not {loss}.")
        self.loss, self.beta, self.label_smoothing = loss, beta, label_smoothing
        self.gamma = 0.5 if gamma is None else gamma
        self.normalized = length_normalized or loss in NORMALIZED
        if loss in WITHOUT:
            self.reference = None  # no starting model is asked

    def examples(self, book: Book, tokenizer: Any, config: Config) -> PairExamples:
        return PairExamples(book, tokenizer, config)

    @staticmethod  # it reads no keywords, so runs with others share its answers
    def reference(forward: Callable, batch: PairBatch) -> Tensor:
        """(B, 2) float32: log-probabilities of the two answers."""
        return _log_probabilities(forward, batch)[0]

    def __call__(self, forward: Callable, batch: PairBatch, k: int) -> Terms:
        logps, tokens = _log_probabilities(forward, batch)
        scores = logps - batch.reference  # (B, 2)
        if self.normalized:
            scores = scores / tokens
        losses = self.of(*scores.unbind(1))
        sums = _by_task(losses, batch.pair, k) - _by_task(logps[:, 0], batch.sft, k)
        counts = _by_task(torch.ones_like(batch.pair), batch.pair, k)
        counts += _by_task(tokens[:, 0], batch.sft, k)
        return Terms(sums, counts, {}, self._measured(scores.detach(), batch, k))

    def of(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(B,) float32 losses from the two sides' scores, (B,) each: s above."""
        delta = self.beta * (chosen - rejected)
        e = self.label_smoothing
        match self.loss:
            case "sigmoid":
                return -(1 - e) * F.logsigmoid(delta) - e * F.logsigmoid(-delta)
            case "simpo":
                delta = delta - self.gamma
                return -(1 - e) * F.logsigmoid(delta) - e * F.logsigmoid(-delta)
            case "robust":
                right, wrong = F.logsigmoid(delta), F.logsigmoid(-delta)
                return (e * wrong - (1 - e) * right) / (1 - 2 * e)
            case "hinge":
                return torch.relu(1 - delta)
            case "ipo":
                return (chosen - rejected - 1 / (2 * self.beta)) ** 2
            case "apo_zero":
                return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)
            case "orpo":
                odds = _log_odds(chosen) - _log_odds(rejected)
                return -chosen - self.beta * F.logsigmoid(odds)

    def _measured(self, scores: Tensor, batch: PairBatch, k: int) -> dict[str, Tensor]:
        """(K, 2): sums over pairs, and pairs."""
        chosen, rejected = (self.beta * scores.double()).unbind(1)
        each = {
            "reward_accuracy": (chosen > rejected).double(),
            "reward_margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        count = _by_task(torch.ones_like(chosen), batch.pair, k)
        return {
            name: torch.stack([_by_task(values, batch.pair, k), count], 1)
            for name, values in each.items()
        }


def _sides(piece: Piece, number: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Both sides as `collate` takes sequences."""
    return [
        (piece.columns[name], piece.columns[f"{name}_target"].view(np.bool_), 2 * number + i)
        for i, name in enumerate(("chosen", "rejected"))
    ]


def _log_probabilities(forward: Callable, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(B, 2) float32 log-probabilities of the answers, and (B, 2) int64, their tokens."""
    outputs = forward(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        targets=Targets(batch.at, batch.labels, batch.most),
    )
    of_sequence = Terms.by_task(-outputs.loss, batch.task, 2 * len(batch.pair))
    return of_sequence.sums.view(-1, 2), of_sequence.counts.view(-1, 2)


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0."""
    # An answer that is certain in float32 has p = 1; its odds stay finite.
    return log_probability - torch.log((-torch.expm1(log_probability)).clamp(min=1e-10))


def _by_task(values: Tensor, task: Tensor, k: int) -> Tensor:
    """(K,): the sum of each task's values. A masked sum has a fixed order on a GPU too."""
    mine = task == torch.arange(k, device=task.device)[:, None]
    return torch.where(mine, values, 0).sum(1)
