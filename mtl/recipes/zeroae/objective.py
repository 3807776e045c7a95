"""The two parts of ZeroAE, each an objective: a classifier of texts, and a generator of them."""

from collections.abc import Callable

import torch.nn.functional as F

from mtl.config import Config
from mtl.data.examples import Book
from mtl.losses.terms import Terms
from mtl.recipes.zeroae.examples import (
    SCORERS,
    Classes,
    PromptBatch,
    PromptExamples,
    TextBatch,
    TextExamples,
)

PROMPT = "This text is about {label}."


class Classify:
    """Binary cross-entropy of a text beside its class's prompt and beside one other class's, in
    nats per pair.

    Args:
        encoder: folder or hub name of the encoder, as the loader's.
        labels: a JSON file with the list of the classes' names.
        prompt: a text with {label}.
        scorer: `bi` compares embeddings of text and prompt; `cross` reads both as one (published),
            and begins with the encoder's own head where that is an NLI model.

    Raises:
        ValueError: a keyword is out of range.
    """

    unit = PromptExamples.unit

    def __init__(self, encoder: str, labels: str, prompt: str = PROMPT, scorer: str = "bi"):
        if scorer not in SCORERS:
            raise ValueError(f"scorer: found {scorer!r}, wanted bi or cross.")
        self.encoder, self.labels, self.prompt, self.scorer = encoder, labels, prompt, scorer

    def examples(self, book: Book, tokenizer: object, config: Config) -> PromptExamples:
        classes = Classes(config, self.encoder, self.labels, self.prompt)
        return PromptExamples(book, tokenizer, config, classes, self.scorer)

    def __call__(self, forward: Callable, batch: PromptBatch, k: int) -> Terms:
        scores = forward(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids, text=batch.text, prompt=batch.prompt,
        )  # fmt: skip
        losses = F.binary_cross_entropy_with_logits(scores.float(), batch.right, reduction="none")
        return Terms.by_task(losses, batch.task, k)


class Generate:
    """Cross-entropy of a text's tokens and its end, given its class's prompt and its code, in nats
    per token. Two penalties, which no balancer weighs: the codes' divergence from uniform, and an
    adversary's success at telling from two codes whether their texts are of one class.

    Args:
        encoder, labels, prompt: as `Classify`.
        codes: m, how many discrete codes there are.
        beta: factor on the divergence. gamma: factor on the adversary; 0: none.

    Raises:
        ValueError: a keyword is out of range.
    """

    unit = "target token"
    INPUTS = (
        "input_ids", "attention_mask", "decoder_ids", "decoder_mask", "at", "label", "noise",
        "first", "second",
    )  # fmt: skip

    def __init__(
        self,
        encoder: str,
        labels: str,
        prompt: str = PROMPT,
        codes: int = 32,
        beta: float = 1.0,
        gamma: float = 0.1,
    ):
        if isinstance(codes, bool) or not isinstance(codes, int) or codes < 1:
            raise ValueError(f"codes: found {codes!r}, wanted a whole number, 1 or more.")
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not value >= 0:
                raise ValueError(f"{name}: found {value!r}, wanted 0 or more.")
        self.encoder, self.labels, self.prompt = encoder, labels, prompt
        self.codes, self.beta, self.gamma = codes, beta, gamma

    def examples(self, book: Book, tokenizer: object, config: Config) -> TextExamples:
        classes = Classes(config, self.encoder, self.labels, self.prompt)
        return TextExamples(book, tokenizer, config, classes, self.codes)

    def __call__(self, forward: Callable, batch: TextBatch, k: int) -> Terms:
        logits, divergence, judged = forward(**{n: getattr(batch, n) for n in self.INPUTS})
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        told = F.binary_cross_entropy_with_logits(judged.float(), batch.same, reduction="sum")
        penalties = {
            "kl": self.beta * divergence.float().mean(),
            "disentangle": self.gamma * told / max(1, len(batch.same)),
        }
        return Terms.by_task(losses, batch.task, k, penalties)
