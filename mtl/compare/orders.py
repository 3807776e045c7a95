"""What the order of rows left behind in replicas of a run, and in models that were made of them:
`mtl.train.imbalance`, measured on training rows and drawn.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl import plugins
from mtl.build import Data
from mtl.compare import evaluation
from mtl.config import Config
from mtl.data.batches import Layout
from mtl.data.plan import layouts_for, mix_for, steps_of
from mtl.distributed import comm
from mtl.losses.objective import maker_of_examples
from mtl.output import provenance
from mtl.train.imbalance import Imbalance, measure, places, row_losses

CHANCE = "by chance"


def applies(config: Config, allow_code: Collection[str] = ()) -> bool:
    """Whether every row has a loss of its own that we can measure: next-token prediction."""
    return all(
        maker_of_examples(one) is None for one in plugins.objectives(config, allow_code).each
    )


def study(
    experiment: tuple[str, Sequence[str], Collection[str]],
    data: Data,
    runs: Sequence[Path],
    models: Sequence[Path] = (),
) -> dict[str, Imbalance]:
    """The imbalance of replicas together ("replicas"), of the same losses with each replica's
    places shuffled ("by chance"), and of every other model, by its path. A collective.

    A model made of the replicas is centred by their mean and has the places of the first of them.

    Args:
        experiment: the YAML, its overrides, and the packages whose code may run.
        data: of `build.encode`.
        runs: folders of replicas, each with an exported model.
        models: folders of models made of them, or of controls.

    Raises:
        ValueError: a run is no replica, or was trained on other rows than `experiment` has now.
    """
    config = plugins.read(*experiment)
    if not applies(config, experiment[2]):
        raise ValueError(
            f"{config.where('objective')}: objective: found one with examples of its own, wanted "
            "next-token prediction: losses of single rows are measured for that alone."
        )
    where = [np.concatenate(_places(experiment, data, run)) for run in runs]
    opened = evaluation.opener(config, data, experiment[2])
    losses = {folder: _losses(config, data, *opened(folder)) for folder in _folders(runs, models)}
    trained = [losses[run / "model"] for run in runs]
    rng = np.random.default_rng(config.train.seed)
    found = {
        "replicas": measure(trained, where),
        # What spread there is without any order: the same losses at places drawn by lot.
        CHANCE: measure(trained, [rng.permutation(each) for each in where]),
    }
    mean = np.mean(trained, axis=0)
    return found | {str(one): measure([losses[one]], where[:1], mean) for one in models}


def _folders(runs: Sequence[Path], models: Sequence[Path]) -> list[Path]:
    return [*(run / "model" for run in runs), *models]


def _places(
    experiment: tuple[str, Sequence[str], Collection[str]], data: Data, run: Path
) -> list[np.ndarray]:
    """Per task the places of its rows in the first epoch of a run."""
    record = run / "run.json"
    if not record.is_file():
        raise ValueError(f"{run}: found no run.json, wanted the folder of a run (its `output:`).")
    then = json.loads(record.read_text(encoding="utf-8"))
    order = then["config"]["train"]["order"]
    if order is None:
        raise ValueError(f"{run}: found a run of the one order, wanted a replica (`train.order`).")
    path, sets, allow_code = experiment
    # The YAML has no order of its own; the replica's stands in its record.
    config = plugins.read(path, [*sets, f"train.order={json.dumps(order)}"], allow_code)
    mix = mix_for(config, data.tasks)
    now = provenance.identity(config, data.tasks, steps_of(config, mix))
    if differs := [key for key in now if then["identity"].get(key) != now[key]]:
        raise ValueError(
            f"{run}: was trained with another {', '.join(differs[:3])} than {path} has now. Give "
            "the YAML and --set of that run."
        )
    return places(mix, steps_of(config, mix))


def _losses(config: Config, data: Data, model: evaluation.Bare, packed: bool) -> np.ndarray:
    """(n,) nats per target token of every training row, task after task."""
    ranks, of = (comm.world(), comm.rank()), data.goals.of
    tokens = config.evaluate.tokens or config.batch.tokens
    layouts = layouts_for(config, data.tasks, data.examples, of, *ranks, packed, tokens)
    found = []
    for task, number in zip(data.tasks, of, strict=True):
        # Like the run's own, but that a row's number is its task.
        layout = Layout(*ranks, tokens, 0, packed, layouts.each[number].row_length)
        found.append(row_losses(model, data.goals.each[number], task.train, layout))
    return np.concatenate(found)


def plain(found: Mapping[str, Imbalance]) -> dict[str, Any]:
    """For JSON. `spread` is (highest - lowest of the curve) / mean loss."""
    return {
        name: {
            "curve": one.curve.tolist(),
            "spearman": one.spearman,
            "spread": one.spread,
            "interval": list(one.interval),
        }
        for name, one in found.items()
    }


def table(found: Mapping[str, Imbalance]) -> list[list[str]]:
    """A row each: rank correlation of loss and place, spread, its interval."""
    rows = [["loss of training rows by place", "spearman", "spread", "95 % interval"]]
    for name, one in found.items():
        interval = " to ".join(f"{100 * x:.2f}" for x in one.interval)
        rows.append([name, f"{one.spearman:+.3f}", f"{100 * one.spread:.2f} %", f"{interval} %"])
    return rows


def figure(found: Mapping[str, Imbalance], path: Path) -> None:
    """Each curve over the place in the first epoch. Needs matplotlib (the extra `plot`)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as e:
        raise ValueError("matplotlib is not installed: pip install matplotlib.") from e
    fig, axes = plt.subplots(figsize=(7, 4))
    for name, one in found.items():
        x = (np.arange(len(one.curve)) + 0.5) / len(one.curve)
        style = {"replicas": "o-", CHANCE: ":"}.get(name, "--")
        axes.plot(x, one.curve, style, label=f"{Path(name).name}: {100 * one.spread:.2f} %")
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("place of a training row in the first epoch")
    axes.set_ylabel("its loss at the end, less its mean\n(nats per target token)")
    axes.legend(title="(highest - lowest) / mean loss", frameon=False)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
