"""Encoded rows for people: decoded, with their targets marked."""

import numpy as np
from transformers import PreTrainedTokenizerBase

SHOWN = 400  # tokens of an example that are shown


def marked(
    tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, target: np.ndarray, color: bool
) -> str:
    """A row as the model reads it, special tokens included; its targets in color or in [[ ]].

    Args:
        tokens: (n,) ids.
        target: (n,) bool.
    """
    ids = tokens.tolist()
    first = int(target.argmax())
    start = max(0, first - SHOWN // 2) if len(ids) > SHOWN else 0
    stop = min(len(ids), start + SHOWN)
    edges = [start, *(j for j in range(start + 1, stop) if target[j] != target[j - 1]), stop]
    # Decoded as a whole up to each edge: by themselves, tokens lose leading spaces and parts of
    # characters.
    texts = [
        tokenizer.decode(ids[start:edge], clean_up_tokenization_spaces=False) for edge in edges[1:]
    ]
    shown, before = [], ""
    for edge, text in zip(edges, texts, strict=False):
        part = text[len(before) :] if text.startswith(before) else text
        mark = ("\033[32m{}\033[0m" if color else "[[{}]]") if target[edge] else "{}"
        shown.append(mark.format(part))
        before = text
    left = [f"({start:,} tokens before) "] if start else []
    right = [f" (and {len(ids) - stop:,} more tokens)"] if stop < len(ids) else []
    return "".join([*left, *shown, *right])
