"""The greedy soup: average a sub-model in where that lowers the validation loss."""

from mtl.merging.candidates import Candidates, chooses


@chooses
def soup(candidates: Candidates) -> list[float]:
    """(K,) weights: equal for the members, 0 for the others.

    Sub-models are tried from the best to the worst; one is in where the loss does not rise.

    Source: Wortsman et al., ICML 2022 (arXiv 2203.05482), recipe 1. It chooses by held-out
    accuracy; we by the mean of the tasks' losses.
    """
    k = candidates.k
    order = sorted(range(k), key=lambda i: candidates.loss([float(j == i) for j in range(k)]))
    members: list[int] = []
    lowest = float("inf")
    for i in order:
        tried = [*members, i]
        loss = candidates.loss([(j in tried) / len(tried) for j in range(k)])
        if loss <= lowest:
            members, lowest = tried, loss
    return [(j in members) / len(members) for j in range(k)]
