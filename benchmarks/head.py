"""Peak memory and time of head and loss, forward and backward:
python benchmarks/head.py [--positions 2048] [--vocabulary 49152].

A model without layers (embeddings, norm and a head as wide as SmolLM2-135M's) makes hidden states
at no cost, so what is held beyond the parameters and their gradients is logits, what the loss makes
of them and, where the head is trained, its newest gradient before it is added to the others. Each
case runs in a process of its own; the figure is the most that it held, over what it held before the
forward. The time is the shortest of five steps.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# A fixed threshold: freed tensors go back to the system at once, and what is resident is what is
# held. glibc's own moves up to 32 MiB, and the freed slices below it stay in a heap that they
# fragment.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

CASES = {
    "full": "full padded logits (transformers' own loss)",
    "ours": "ours (objective causal_lm)",
    "none": "torch's linear_cross_entropy, a loss for each token",
    "sum": "torch's linear_cross_entropy, their sum",
}


def peak_of(
    case: str, positions: int, vocabulary: int, hidden: int, targets: float, trained: bool
) -> dict[str, float]:
    """MiB held beyond the start, the loss, seconds of a step, and the norms of its gradients."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtl.data.collate import collate
    from mtl.losses import head
    from mtl.losses.causal_lm import causal_lm

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=0,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device)
    head.install(model)  # as the engine does; without `targets` the forward is transformers' own
    model.model.embed_tokens.requires_grad_(False)  # its gradient is none of the loss's
    model.lm_head.requires_grad_(trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(
                parameter
            ).zero_()  # touched, so that it is held from here on
    rng, width = np.random.default_rng(0), 256
    wanted = np.arange(width) >= max(1, width - targets * width)
    rows = [[(rng.integers(0, vocabulary, width), wanted, 0)] for _ in range(positions // width)]

    def step(rows: list) -> float:
        if case == "full":
            ids = torch.from_numpy(np.stack([ids for ((ids, _, _),) in rows])).to(device)
            target = torch.from_numpy(np.stack([target for ((_, target, _),) in rows])).to(device)
            loss = model(input_ids=ids, labels=ids.masked_fill(~target, -100)).loss
        elif case in ("none", "sum"):
            batch = collate(rows, 0, packed=False).to(device)
            answer = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            hidden = answer.last_hidden_state.flatten(0, 1).index_select(0, batch.at)
            losses = torch.nn.functional.linear_cross_entropy(
                hidden,
                model.lm_head.weight,
                batch.labels,
                reduction=case,
                options=torch.nn.LinearCrossEntropyOptions(),
            )
            loss = losses.sum() / len(batch.labels)
        else:
            terms = causal_lm(model, collate(rows, 0, packed=False).to(device), 1)
            loss = terms.sums.sum() / terms.counts.sum()
        loss.backward()
        return float(loss.detach())

    step(
        [[(ids[:4], np.arange(4) > 0, 0)] for ((ids, _, _),) in rows[:1]]
    )  # whatever is loaded at the first use
    held = _held(device, reset=True)
    loss = step(rows)
    found = {"mib": _held(device) - held, "loss": loss}
    found["gradients"] = [float(p.grad.norm()) for p in model.parameters() if p.requires_grad]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        step(rows)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return found | {"seconds": min(seconds)}


def _held(device: str, reset: bool = False) -> float:
    """MiB held at most since the last reset, which begins at what is held now."""
    if device == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # proc(5): the high water mark of resident memory
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(
    positions: int = 2048,
    vocabulary: int = 49152,
    hidden: int = 576,
    targets: float = 1.0,
    trained: bool = True,
) -> dict[str, dict]:
    """Every case in a fresh process; {case: {"mib", "loss", "gradients", "seconds"}}."""
    found = {}
    for case in CASES:
        size = [str(value) for value in (positions, vocabulary, hidden, targets, int(trained))]
        made = subprocess.run(
            [sys.executable, __file__, "--case", case, *size],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        found[case] = json.loads(made.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument(
        "--targets", type=float, default=1.0, help="part of the positions that predict a target"
    )
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        case, positions, vocabulary, hidden, targets, trained = args.case
        print(
            json.dumps(
                peak_of(
                    case,
                    int(positions),
                    int(vocabulary),
                    int(hidden),
                    float(targets),
                    bool(int(trained)),
                )
            )
        )
        return
    for trained in (True, False):
        for case, value in measure(
            args.positions, args.vocabulary, targets=args.targets, trained=trained
        ).items():
            head = "trained" if trained else "frozen"
            print(
                f"{CASES[case]}, head {head}: {value['mib']:.0f} MiB, "
                f"{value['seconds']:.2f} s, loss {value['loss']:.5f}"
            )


if __name__ == "__main__":
    main()
