"""What the examples train: a random Llama of 30,000 parameters on two made-up tasks. Put your own
model and data here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TASKS = ["count", "repeat"]
LENGTH, VOCABULARY = 12, 64


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ))  # fmt: skip


def batch(rows: int, seed: int) -> dict[str, Tensor]:
    """input_ids (rows, LENGTH) and each row's task (rows,): counting upwards is learned sooner than
    repeating half a row.
    """
    generator = torch.Generator().manual_seed(seed)
    task = torch.arange(rows) % len(TASKS)
    count = torch.randint(VOCABULARY, (rows, 1), generator=generator) + torch.arange(LENGTH)
    half = torch.randint(VOCABULARY, (rows, LENGTH // 2), generator=generator)
    ids = torch.where(task[:, None] == 0, count % VOCABULARY, torch.cat([half, half], 1))
    return {"input_ids": ids, "task": task}


def token_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses of the target tokens (T,) in nats, and their tasks (T,)."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    return losses, batch["task"].repeat_interleave(LENGTH - 1)
