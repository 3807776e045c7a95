"""A teacher's distribution at a target, kept small, and the divergence of a model from it.

Of a distribution p over V tokens are kept the 64 likeliest tokens and the mass of all others, as
one bucket. The divergence of the model q from it, in nats, is

    KL(p || q) = sum over kept tokens and the bucket of p (log p - log q)

With V <= 64 it is the whole distributions' divergence. Above, it is a lower bound of that (the data
processing inequality): how q divides the bucket's mass is left to it.
"""

import torch
from torch import Tensor

TOP = 64


def summary(logits: Tensor, top: int = TOP) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each of n distributions, and what is kept of them.

    Args:
        logits: (n, V) float32.

    Returns:
        ids: (n, m) int64, m = min(top, V), the likeliest first.
        log_p: (n, m + 1) float32, their log-probabilities and the bucket's; (n, m) where m = V.
    """
    ids = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return ids, _log_probabilities(logits, ids)


def divergence(logits: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """(n,) float32, the divergence in nats of the model from its teacher, at each of n targets.

    Its gradient by the logits is q - p at a kept token, and q (1 - p_bucket / q_bucket) elsewhere.

    Args:
        logits: (n, V) float32, the model's.
        ids, log_p: as `summary` gives them, of the teacher.
    """
    p, log_q = log_p.exp(), _log_probabilities(logits, ids)
    # where: a token without any probability in either counts nothing, and is no nan.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


def _log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """(n, m + 1): of the tokens `ids`, and of all others together; (n, m) where there are none."""
    found = logits.gather(1, ids)
    if ids.shape[1] < logits.shape[1]:
        # Not 1 - sum: most targets leave the bucket a mass near fp32's rounding.
        others = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        found = torch.cat([found, others], 1)
    return found - logits.logsumexp(1, keepdim=True)
