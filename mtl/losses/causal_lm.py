"""Next-token prediction, the objective of a causal language model.

`forward` takes `targets` (mtl/losses/head.py) beside the model's own inputs, and then answers with
token losses, not logits.
"""

from collections.abc import Callable

from mtl.data.collate import MicroBatch
from mtl.losses.head import Targets
from mtl.losses.terms import Terms


def causal_lm(forward: Callable, batch: MicroBatch, k: int, *, router_loss: float = 0.0) -> Terms:
    """Next-token cross-entropy, in fp32, on target tokens only; with a mixture of experts, its
    router loss as a penalty. Where a target has a teacher, the divergence from it.

    The head also runs when there is no target: at ZeRO 3 every rank must gather the head's weights.

    Args:
        router_loss: coefficient of the load-balancing loss that transformers computes for a mixture
            of experts (Switch Transformers, arXiv 2101.03961, eq. 4-6), over a micro-batch's
            positions; 0 = none. A model's own is its configuration's `router_aux_loss_coef`.

    Raises:
        ValueError: a router loss is asked of a model that has none.
    """
    outputs = forward(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        targets=Targets(batch.at, batch.labels, batch.most, batch.teacher),
        **({"output_router_logits": True} if router_loss else {}),
    )
    penalties = {}
    if router_loss:
        if getattr(outputs, "aux_loss", None) is None:
            raise ValueError(
                f"objective.router_loss: found {router_loss}, wanted 0: this model gives no router "
                "loss (aux_loss)."
            )
        penalties["router_loss"] = router_loss * outputs.aux_loss
    return Terms.by_task(outputs.loss, batch.task, k, penalties)
