"""A study's results as one JSON, a Markdown table and a figure; runs that are missing are left out.

G = mean over tasks of ln(L / R): L is a task's test loss at the checkpoint that validation chose, R
that of the task trained alone. Without references R = 1. Differences between arms do not depend on
R.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.compare import statistics
from mtl.compare.runs import Runner
from mtl.compare.study import StudyError
from mtl.output.files import write_json, write_text

Results = Mapping[str, Mapping[int, dict[str, Any]]]  # arm -> seed -> a finished run's result
COLUMNS = (
    "arm", "seeds", "G", "G at the last step", "macro", "worst", "spread", "against", "interval",
    "p", "p (Holm)", "least effect", "win rate", "captured", "cost",
)  # fmt: skip


def write(runner: Runner, page: Path | None = None) -> list[Path]:
    """Write OUT/comparison.json, .md and, where matplotlib is installed, .png. Returns the paths;
    none before the first run is finished.

    Args:
        page: where the table is to stand too, under the name of the study's file (`insert`).
    """
    found = comparison(runner)
    if not found["arms"]:
        return []
    paths = [runner.out / f"comparison.{kind}" for kind in ("json", "md", "png")]
    write_json(paths[0], found)
    write_text(paths[1], markdown(found))
    if page:
        insert(page, runner.study.path.stem, markdown(found))
    return paths if figure(found, paths[2]) else paths[:2]


def comparison(runner: Runner) -> dict[str, Any]:
    """What the finished runs say. Raises StudyError where a result is of other settings."""
    study, results = runner.study, _results(runner)
    arms = {arm: found for arm, found in results["arms"].items() if found}
    alone = _references(study.seeds["references"], results["references"])
    tasks = next((one["tasks"] for found in arms.values() for one in found.values()), [])
    # R of some tasks only would make G a mean of unlike things.
    reference = alone if alone.keys() == set(tasks) else None
    rows = {arm: _row(found, reference) for arm, found in arms.items()}
    for arm, found in arms.items():
        if arm != study.against and study.against in arms:
            rows[arm] |= _against(found, arms[study.against], study.explore)
    if study.equal in arms:
        equal = rows[study.equal]
        for arm, row in rows.items():
            shared = sorted(set(arms[arm]) & set(arms[study.equal]))
            row["captured"] = _captured(arms[arm], arms[study.equal], shared)
            row["cost_of_equal"] = row["cost"] / equal["cost"]
    tested = [rows[arm] for arm in study.tested if "p" in rows.get(arm, {})]
    # Of all arms tested: one that failed or is not finished takes no test away from the others.
    adjusted = statistics.holm([row["p"] for row in tested], len(study.tested))
    for row, p in zip(tested, adjusted, strict=True):
        row["p_holm"] = p
    runs = study.runs()
    done = sum(runner.path(run).is_file() for run in runs)
    return {
        "study": str(study.path), "base": study.base, "runs": {"finished": done, "all": len(runs)},
        "unit": "G: nats, a mean of ln(L / R); losses: nats per target token",
        "against": study.against, "equal": study.equal, "explore": study.explore,
        "primary": list(study.primary), "shortfall": study.shortfall,
        "tuning": _tuning(results["tuning"]),
        "references": reference, "arms": rows,
    }  # fmt: skip


def _results(runner: Runner) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    found: dict[str, dict[str, dict[int, dict[str, Any]]]]
    found = {"arms": {}, "references": {}, "tuning": {}}
    for run in runner.study.runs():
        if (result := runner.result(run)) is not None:
            found[run.kind].setdefault(run.arm, {})[run.seed] = result
    order = runner.study.arms["arms"]
    found["arms"] = {arm: found["arms"][arm] for arm in order if arm in found["arms"]}
    return found


def _references(seeds: Sequence[int], results: Results) -> dict[str, float]:
    """Task -> R: the mean test loss of the reference arm with the least mean validation loss; of
    arms with every seed finished.
    """
    chosen: dict[str, tuple[float, float]] = {}
    for found in results.values():
        if len(found) < len(seeds):
            continue
        each = list(found.values())
        (task,) = each[0]["tasks"]
        # The least loss of any pass, as the run's own best.
        valid = float(np.mean([min(one["validation"][task]) for one in each]))
        test = float(np.mean([one["test"]["best"][task] for one in each]))
        chosen[task] = min(chosen.get(task, (np.inf, np.inf)), (valid, test))
    return {task: test for task, (_, test) in chosen.items()}


def _tuning(results: Results) -> dict[str, dict[str, Any]]:
    """By arm its seeds, and the least mean log validation loss of a pass, the mean of the seeds.
    Test rows are not looked at.
    """
    found = {}
    for arm, runs in results.items():
        scores = [
            float(np.log([one["validation"][task] for task in one["tasks"]]).mean(0).min())
            for one in runs.values()
        ]
        found[arm] = {"seeds": sorted(runs), "validation": float(np.mean(scores))}
    return found


def _score(losses: Mapping[str, float], reference: Mapping[str, float] | None = None) -> float:
    """G of one run."""
    ratios = [loss / (reference[task] if reference else 1) for task, loss in losses.items()]
    return float(np.log(ratios).mean())


def _row(found: Mapping[int, dict[str, Any]], reference: Mapping[str, float] | None) -> dict:
    each = [one["test"] for _, one in sorted(found.items())]
    best = [list(one["best"].values()) for one in each]
    scores = [_score(one["best"], reference) for one in each]
    spread = [np.std(list(one["steps"]["own"].values())) for one in found.values()]
    lengths = [one["steps"]["run"] for one in found.values()]
    return {
        "seeds": sorted(found),
        "G": float(np.mean(scores)),
        "G_by_seed": scores,
        "G_last": float(np.mean([_score(one["last"], reference) for one in each])),
        "macro": float(np.mean(best)),
        "worst": float(np.mean(np.max(best, axis=1))),
        "spread": float(np.mean(np.array(spread) / lengths)),
        "cost": float(np.mean([one["cost"] for one in found.values()])),
        "losses": {
            task: float(np.mean([one["best"][task] for one in each])) for task in each[0]["best"]
        },
    }


def _against(
    found: Mapping[int, dict[str, Any]], other: Mapping[int, dict[str, Any]], explore: bool
) -> dict[str, Any]:
    """Paired differences, by seed. Below 0: better than the other."""
    shared = sorted(set(found) & set(other))
    if not shared:
        return {}
    pairs = [(found[seed]["test"]["best"], other[seed]["test"]["best"]) for seed in shared]
    differences = [_score(mine) - _score(theirs) for mine, theirs in pairs]
    wins = [mine[task] < theirs[task] for mine, theirs in pairs for task in mine]
    row: dict[str, Any] = {
        "pairs": len(shared),
        "difference": float(np.mean(differences)),
        "differences": differences,
        "win_rate": float(np.mean(wins)),
    }
    if len(shared) > 1:
        row["least_effect"] = statistics.least_effect(differences)
    if not explore and statistics.least_p(len(shared)) <= 1 - statistics.LEVEL:
        row["interval"] = statistics.interval(differences)
        row["p"] = statistics.sign_flip(differences)
    return row


def _captured(found: Mapping[int, Any], equal: Mapping[int, Any], seeds: list[int]) -> float | None:
    """(G_equal - G) / (G_equal - G_oracle), where the oracle reads each task of equal's runs at its
    own best step. None where that is no gain, or not known.
    """
    if not seeds:
        return None

    def mean(results: Mapping[int, Any], at: str) -> float:
        return float(np.mean([_score(results[seed]["test"][at]) for seed in seeds]))

    # Runs from before this arm was named `equal:` did not read their tasks' own best models.
    if not all("own" in equal[seed]["test"] for seed in seeds):
        return None
    room = mean(equal, "best") - mean(equal, "own")
    return (mean(equal, "best") - mean(found, "best")) / room if room > 0 else None


def markdown(found: Mapping[str, Any]) -> str:
    """The table, the best arm first, and below it what it means."""
    rows = sorted(found["arms"].items(), key=lambda item: item[1]["G"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(_cells(arm, row)) + " |" for arm, row in rows]
    runs = found["runs"]
    notes = [
        f"{runs['finished']} of {runs['all']} runs of `{found['study']}` are finished.",
        "G: mean over tasks of ln(L / R) on test rows, at the checkpoint of least mean log "
        "validation loss; lower is better. "
        + ("R: the task trained alone." if found["references"] else "R = 1: no references yet."),
        f"against: paired difference to `{found['against']}`; interval: 95 %, BCa bootstrap; "
        "p: two-sided sign flips; least effect: found with 80 % power by so many pairs.",
        f"captured: part of what `{found['equal']}` would gain if each task stopped at its own "
        f"best step. cost: forward-equivalents over those of `{found['equal']}`. spread: deviation "
        "of the tasks' best steps over the run.",
    ]
    if found["explore"]:
        notes.append("`explore: true`: nothing is tested.")
    elif found["primary"]:
        notes.append(
            f"p (Holm) is over {', '.join(f'`{arm}`' for arm in found['primary'])}, which were "
            "named before; the other p are no claims."
        )
    few = [row["pairs"] for _, row in rows if "pairs" in row and "p" not in row]
    if few and not found["explore"]:
        least = statistics.least_p(max(few))
        notes.append(
            f"Arms without p have at most {max(few)} pairs, which cannot give a p below "
            f"{least:.3f}: no claim about them."
        )
    if found["shortfall"]:
        notes.append(found["shortfall"])
    for arm, row in sorted(found["tuning"].items(), key=lambda item: item[1]["validation"]):
        seeds = ", ".join(map(str, row["seeds"]))
        notes.append(f"Tuning, seeds {seeds}: `{arm}` {row['validation']:+.4f} (validation).")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def insert(page: Path, name: str, text: str, by: str = "launch/compare.py") -> None:
    """Put a table into a page, between its lines `<!-- NAME: written by BY -->` and
    `<!-- end of NAME -->`.

    Raises:
        StudyError: the page lacks one of them.
    """
    begin, end = f"<!-- {name}: written by {by} -->", f"<!-- end of {name} -->"
    given = page.read_text(encoding="utf-8")
    for line in begin, end:
        if line not in given:
            raise StudyError(f"{page}: found no line {line!r}, wanted one: the table goes there.")
    before, _, rest = given.partition(begin)
    after = rest.partition(end)[2]
    write_text(page, f"{before}{begin}\n\n{text}\n{end}{after}")


def _cells(arm: str, row: Mapping[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        value = row.get(key)
        return "-" if value is None else format(value, form)

    low_high = row.get("interval")
    return [
        arm,
        str(len(row["seeds"])),
        *(number(key, "+.4f") for key in ("G", "G_last")),
        *(number(key, ".4f") for key in ("macro", "worst")),
        number("spread", ".2f"),
        number("difference", "+.4f"),
        "{:+.4f} to {:+.4f}".format(*low_high) if low_high else "-",
        *(number(key, ".4f") for key in ("p", "p_holm", "least_effect")),
        number("win_rate", ".2f"),
        number("captured", "+.2f"),
        number("cost_of_equal", ".2f"),
    ]


def figure(found: Mapping[str, Any], path: Path) -> bool:
    """Draw every arm's paired differences; whether matplotlib (the extra `plot`) is there to."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return False
    rows = [(arm, row) for arm, row in found["arms"].items() if "difference" in row]
    rows.sort(key=lambda item: -item[1]["difference"])
    fig, axis = plt.subplots(figsize=(7, 1.2 + 0.3 * len(rows)))
    for y, (_, row) in enumerate(rows):
        axis.plot(row["differences"], [y] * row["pairs"], ".", color="0.7")
        axis.plot(row["difference"], y, "o", color="C0")
        if "interval" in row:
            axis.plot(row["interval"], [y, y], color="C0")
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(rows)), [arm for arm, _ in rows])
    axis.set_xlabel(f"G less that of {found['against']} (dots: seeds; lines: 95 %); left is better")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True
