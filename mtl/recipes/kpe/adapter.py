"""One small adapter beside a frozen language model: it reads knowledge and changes its last blocks.

Shapes: N candidates (question with one option) of T tokens, M knowledge texts of U tokens, hidden
size H, width d. Zhao et al., ACL 2023; equations as released, its masks mended (docs/kpe.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.recipes.shared import masked_mean

TIED = "vocabulary"  # the name of the one Tied in a model


class Fusion(nn.Module):
    """A post-norm transformer layer, equal to `nn.TransformerEncoderLayer` (ReLU).

    That one reads its children's weights itself, which ZeRO 3 has not gathered then.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(N, S, d) of (N, S, d); seen: (N, S) bool, the positions that are attended to."""
        n, s, d = x.shape
        # (3, N, heads, S, d / heads)
        q, k, v = self.attention(x).view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropped = self.dropout.p if self.training else 0.0
        # (N, 1, 1, S): the same for every head and every query.
        mixed = F.scaled_dot_product_attention(q, k, v, seen[:, None, None], dropped)
        mixed = self.out(mixed.transpose(1, 2).reshape(n, s, d))
        x = self.norms[0](x + self.dropout(mixed))
        wide = self.dropout(F.relu(self.first(x)))
        return self.norms[1](x + self.dropout(self.second(wide)))


class Adapter(nn.Module):
    """What a block's feed-forward output P and the knowledge A tell each other.

        g = sigmoid(w . mean P + b),  X = [g P ; A],  Y = X + LN(W_u ReLU(Fusion(W_d X)))

    Args:
        hidden, width: H, d.
        heads: of the attention; they divide d.
        dropout: within, in training only.
        gate: false: g = 1.
        attend: false: no Fusion, so P and A stay apart.
        residual: false: the block gets LN(...) alone, in place of g P + LN(...).
        gain: the norm's at the start. With 0 Y begins as X: the norm's gain learns first.
    """

    def __init__(
        self, hidden: int, width: int, heads: int, dropout: float,
        gate: bool = True, attend: bool = True, residual: bool = True, gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.gate = nn.Linear(hidden, 1) if gate else None
        self.fusion = Fusion(width, heads, dropout) if attend else None
        self.dropout, self.residual, self.gain = nn.Dropout(dropout), residual, gain
        self.norm = nn.LayerNorm(hidden)

    def forward(self, states: Tensor, knowledge: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the block's output, (N, T, H), and the next A, (N, U, H).

        Args:
            states: (N, T, H), P.
            knowledge: (N, U, H), A.
            seen: (N, T + U) bool, false on padding.
        """
        t = states.shape[1]
        if self.gate is not None:
            g = torch.sigmoid(self.gate(masked_mean(states, seen[:, :t])))
            states = g[:, None] * states
        z = self.down(torch.cat([states, knowledge], 1))
        if self.fusion is not None:
            z = self.fusion(z, seen)
        y = self.norm(self.up(self.dropout(F.relu(z))))
        out = states + y[:, :t] if self.residual else y[:, :t]
        return out, knowledge + y[:, t:]


class Tied(nn.Module):
    """A linear layer to the vocabulary with a frozen embedding's own weight and a bias that learns.

    The weight is a parameter of this module too, so that ZeRO 3 gathers it here. Files of weights
    leave it out.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        # Files leave the tied weight out, and loading must not miss it then.
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_not_missing)

    def forward(self, states: Tensor) -> Tensor:
        """(S, V) logits of (S, H)."""
        return F.linear(states, self.weight, self.bias)


def _leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    state.pop(f"{prefix}weight")


def _not_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name != f"{TIED}.weight"]


def initialize(module: nn.Module) -> None:
    """Weights normal(0, 0.02), biases 0, norms 1 and 0; an adapter's norm has its own gain."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        if isinstance(part, Adapter):
            nn.init.constant_(part.norm.weight, part.gain)
