"""A study's YAML: arms of `--set` overrides over one experiment, each with several seeds."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from balancers import Signal
from mtl import plugins
from mtl.compare.statistics import LEVEL, least_p, pairs_for
from mtl.config import Config, ConfigError
from mtl.config.words import did_you_mean

KEYS = {
    "base": "the experiment's YAML",
    "set": "overrides for every run",
    "seeds": "a number of seeds, or a list of them",
    "against": "the arm that the others are compared with",
    "equal": "the arm whose tasks stopped one by one give the headroom",
    "arms": "a mapping from names to lists of overrides",
    "first": "arms whose runs come first",
    "primary": "arms whose differences are tested for a claim; without it all",
    "explore": "true: fewer seeds than a claim needs",
    "references": "seeds and arms of runs on one task alone",
    "tuning": "seeds and arms of runs that are not reported",
}
# Set first, so that a study's own overrides win.
ALWAYS = (
    "evaluate.best=log",
    "checkpoint.keep=1",
    "checkpoint.bests=each",
    "export.which=best",
    "trackers=[jsonl]",
)


# In an override: the mean weights of another arm's run of the same seed, as they were or each one
# given to the next task, so that weights and tasks no longer belong together.
PLACE = re.compile(r"\{(?P<which>mean|moved):(?P<arm>[\w.-]+)\}")


class StudyError(ValueError):
    """What is wrong with a study; the text says where and what to do."""


@dataclass(frozen=True)
class Trial:
    """One run. `kind`: arms, references or tuning; `arm` names a reference's task too."""

    kind: str
    arm: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its YAML says it.

    Attributes:
        path: the YAML.
        base: the experiment's YAML.
        common: overrides for every run.
        arms: kind -> arm -> its overrides; `references` without a task.
        seeds: kind -> seeds.
        first: names of arms whose runs come first.
        primary: names of the arms that Holm's adjustment is over; none: all.
        against, equal: names of arms.
        explore: no claim is meant.
        allow_code: packages whose code the YAMLs may name.
    """

    path: Path
    base: str
    common: tuple[str, ...]
    arms: Mapping[str, Mapping[str, tuple[str, ...]]]
    seeds: Mapping[str, tuple[int, ...]]
    first: tuple[str, ...]
    primary: tuple[str, ...]
    against: str
    equal: str
    explore: bool
    allow_code: tuple[str, ...] = ()

    def config(self, run: Trial) -> Config:
        """The experiment of a run, equal numbers standing for what others' results will say.

        Raises:
            ConfigError: it does not resolve.
        """
        overrides = [PLACE.sub(self._ones, each) for each in self.overrides(run)]
        return plugins.read(self.base, overrides, self.allow_code)

    @property
    def _tasks(self) -> Mapping[str, Any]:
        """Each task's section of the experiment, as its YAML has it."""
        return plugins.read(self.base, self.common, self.allow_code).document.data["tasks"]

    def _ones(self, _: re.Match[str]) -> str:
        return json.dumps(dict.fromkeys(self._tasks, 1))

    def overrides(self, run: Trial) -> list[str]:
        """In the order they are set: ours, the study's, the arm's, the seed."""
        return [*ALWAYS, *self.common, *run.overrides, f"train.seed={run.seed}"]

    @property
    def tested(self) -> tuple[str, ...]:
        """The arms whose differences are tested for a claim."""
        return self.primary or tuple(arm for arm in self.arms["arms"] if arm != self.against)

    @property
    def shortfall(self) -> str | None:
        """Why no arm can be significant after Holm's adjustment, and what could be done; None: one
        can.
        """
        n, tests = len(self.seeds["arms"]), len(self.tested)
        least = least_p(n) * tests
        if self.explore or least <= 1 - LEVEL:
            return None
        return (
            f"With {n} seeds and {tests} arms tested Holm's p cannot be below {least:.3f} for the "
            f"first, so no claim can be made: wanted {pairs_for(tests)} seeds, or fewer arms "
            "under `primary`."
        )

    def key(self, run: Trial) -> str:
        """What decides a run's outcome as far as the study says it: a short SHA-256."""
        # The content, not the text: a new comment in the YAML makes no result old.
        base = yaml.safe_load(Path(self.base).read_text(encoding="utf-8"))
        text = json.dumps([base, self.overrides(run)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def runs(self) -> list[Trial]:
        """Every run, in the order they are started: tuning, the first arms, the other arms, seed by
        seed, then references, without which nothing but the scale of G is unknown.
        """
        arms = self.arms["arms"]
        first = {name: arms[name] for name in self.first}
        others = {name: arms[name] for name in arms if name not in first}
        return [
            *self._runs("tuning", self.arms["tuning"]),
            *self._runs("arms", first),
            *self._runs("arms", others),
            *self._runs("references", self._alone()),
        ]

    def _runs(self, kind: str, arms: Mapping[str, tuple[str, ...]]) -> Iterator[Trial]:
        for seed in self.seeds[kind]:
            for name, overrides in arms.items():
                yield Trial(kind, name, seed, overrides)

    def _alone(self) -> dict[str, tuple[str, ...]]:
        """Every reference with every task alone: `TASK.ARM`."""
        if not self.arms["references"]:
            return {}
        tasks = self._tasks
        return {
            f"{task}.{name}": (f"tasks={json.dumps({task: given})}", *overrides)
            for name, overrides in self.arms["references"].items()
            for task, given in tasks.items()
        }


def read(path: Path, allow_code: Sequence[str] = ()) -> Study:
    """Read a study and every arm's experiment.

    Raises:
        StudyError: an unknown key, an arm that is not there, too few seeds for a claim, an arm
            whose experiment does not resolve, has a task without test rows, or probes all rows.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: found what cannot be read ({error}), wanted YAML.") from None
    if not isinstance(given, dict):
        raise StudyError(f"{path}: found {given!r}, wanted a mapping with {', '.join(KEYS)}.")
    for key in given:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS)
            raise StudyError(f"{path}: found the key {key!r}, wanted {', '.join(KEYS)}. {hint}")
    for key in ("base", "arms", "seeds", "against"):
        if not given.get(key):
            raise StudyError(f"{path}: {key}: found nothing, wanted {KEYS[key]}.")
    kinds: dict[str, Any] = {"arms": {"arms": given["arms"], "seeds": given["seeds"]}}
    kinds |= {kind: given.get(kind) or {} for kind in ("references", "tuning")}
    study = Study(
        path=path,
        base=str(given["base"]),
        common=_overrides(path, "set", given.get("set") or []),
        arms={kind: _arms(path, kind, part.get("arms") or {}) for kind, part in kinds.items()},
        seeds={kind: _seeds(path, kind, part.get("seeds") or []) for kind, part in kinds.items()},
        first=_overrides(path, "first", given.get("first") or []),
        primary=_overrides(path, "primary", given.get("primary") or []),
        against=str(given["against"]),
        equal=str(given.get("equal") or given["against"]),
        explore=bool(given.get("explore", False)),
        allow_code=tuple(allow_code),
    )
    _check(study)
    return study


def _check(study: Study) -> None:
    arms, n = study.arms["arms"], len(study.seeds["arms"])
    for key in ("against", "equal", "first", "primary"):
        value = getattr(study, key)
        for name in (value,) if isinstance(value, str) else value:
            if name not in arms:
                hint = did_you_mean(name, arms)
                raise StudyError(
                    f"{study.path}: {key}: found {name!r}, wanted an arm: {', '.join(arms)}. {hint}"
                )
    if study.against in study.primary:
        raise StudyError(
            f"{study.path}: primary: found {study.against!r}, wanted arms that are compared with "
            "it."
        )
    both = sorted(set(study.seeds["arms"]) & set(study.seeds["tuning"]))
    if both:
        raise StudyError(
            f"{study.path}: tuning.seeds: found {both[0]}, which is reported too; wanted others."
        )
    if least_p(n) > 1 - LEVEL and not study.explore:
        raise StudyError(
            f"{study.path}: seeds: found {n}, wanted 6 or more: with {n} pairs the least p of a "
            f"two-sided sign-flip test is {least_p(n):.3f}, so no difference can be significant. "
            "With `explore: true` nothing is tested."
        )
    problems = []
    seen = set()
    for run in study.runs():
        # Seeds of an arm differ in one number: one of them stands for all.
        if (run.kind, run.arm) in seen:
            continue
        seen.add((run.kind, run.arm))
        try:
            config = study.config(run)
        except ConfigError as error:
            problems.append(f"{study.path}: {run.kind}.{run.arm}: {error}")
            continue
        problems += [
            config.error(("tasks", task, "test"), "nothing", "rows that are read once, to report")
            for task, section in config.streams.items()
            if section.test is None
        ]
        needs = plugins.holder(config, study.allow_code).balancer.needs
        is_probed = needs & (Signal.VALID_LOSS | Signal.VALID_GRAM)
        if is_probed and config.evaluate.probe.examples == "all":
            wanted = "batch or a number: with all, its cost is not known beforehand"
            problems.append(config.error("evaluate.probe.examples", "all", wanted))
        for place in PLACE.finditer(" ".join(run.overrides)):
            if run.kind != "arms" or place["arm"] not in list(arms)[: list(arms).index(run.arm)]:
                problems.append(
                    f"{study.path}: {run.kind}.{run.arm}: found {place[0]}, wanted an arm above it."
                )
    if problems:
        raise StudyError("\n".join(dict.fromkeys(problems)))


def _arms(path: Path, kind: str, given: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, dict):
        raise StudyError(f"{path}: {kind}: found {given!r}, wanted {KEYS['arms']}.")
    return {str(name): _overrides(path, f"{kind}.{name}", one) for name, one in given.items()}


def _overrides(path: Path, where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        wanted = 'a list of texts, such as ["balancer=CoBa"]'
        raise StudyError(f"{path}: {where}: found {given!r}, wanted {wanted}.")
    return tuple(given)


def _seeds(path: Path, where: str, given: Any) -> tuple[int, ...]:
    seeds: Sequence[Any] = range(given) if isinstance(given, int) else given
    if not isinstance(seeds, Sequence) or not all(isinstance(one, int) for one in seeds):
        raise StudyError(f"{path}: {where}: seeds: found {given!r}, wanted {KEYS['seeds']}.")
    return tuple(seeds)
