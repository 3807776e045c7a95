"""Next-token prediction, the objective of a causal language model.

`forward` takes `targets` (mtl/losses/head.py) beside the model's own inputs, and then answers with
token losses, not logits.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtl.data.collate import MicroBatch
from mtl.losses.head import Targets
from mtl.losses.terms import Terms


def causal_lm(forward: Callable, batch: MicroBatch, k: int, *, router_loss: float = 0.0) -> Terms:
    """Next-token cross-entropy, in fp32, on target tokens only. A mixture of experts may add its
    router loss as a penalty. A target that has a teacher counts the divergence from it.

    The head also runs without a target: at ZeRO 3 every rank must gather the head's weights.

    Args:
        router_loss: coefficient of a mixture of experts' load-balancing loss; 0 = none.
            transformers computes it over a micro-batch's positions (Switch Transformers, arXiv
            2101.03961, eq. 4-6). A model's own coefficient is `router_aux_loss_coef` of its
            configuration.

    Raises:
        ValueError: a router loss is asked of a model that has none.
    """
    outputs = forward(
        **_inputs(batch),
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


def token_losses(forward: Callable, batch: MicroBatch) -> Tensor:
    """(T,) float32, nats of each target of the batch."""
    targets = Targets(batch.at, batch.labels, batch.most)
    return forward(**_inputs(batch), targets=targets).loss


def _teacher(forward: Callable, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    targets = Targets(batch.at, batch.labels, batch.most)
    return forward(**_inputs(batch), targets=targets, summarize=True).logits


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        # With a cache transformers no longer looks for packed rows in the position ids.
        "use_cache": False,
    }


# A function's attribute: `teacher_of` finds it there as on a class.
causal_lm.teacher = _teacher
