"""What finished runs left in their folders, and the groups of those that differ in their seed alone."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dblocks_jax.modes.arms import Arm, names_of_arms
from dblocks_jax.run.errors import UserError, brief
from dblocks_jax.run.naming import shown
from dblocks_jax.run.results import read_result
from dblocks_jax.run.workdir import CONFIG, DATA, logged, read_saved
from dblocks_jax.tasks.shown import SHOWN
from dblocks_jax.tasks.table import entry_of
from dblocks_jax.tasks.task import Entry
from dblocks_jax.training.config import FREE_TO_CHANGE, complete, count_steps

RESULT, EVAL, REPORT = "train.json", "eval.json", "report.json"
OF_ONES_OWN = ("folder", "latents", "text_file")  # data sets that a path names
COUNTED = {"num_images": "images", "num_sequences": "sequences"}  # how a result says what it is of: in words
# In which a baseline is like the blocks.
ALIKE = (
    "hidden_size", "num_heads", "intermediate_size", "patch_size", "image_size", "text_length", "batch_size",
    "accumulate_grad_batches",
)  # fmt: skip
# Which say nothing about the method: runs that differ in these belong together.
# "save_top_k" decides which checkpoint is scored; a data set has a table of its own.
NOT_COMPARED = {"seed", "dataset", *FREE_TO_CHANGE} - {"save_top_k"}


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder."""

    workdir: Path
    entry: Entry  # its task
    config: dict[str, Any]
    result: dict[str, Any]
    by_num_steps: dict[int, float]  # accuracy by the sampler's number of steps, if a report was made
    curve: tuple[list[int], list[float]]  # steps, and what its task draws there

    @property
    def is_diverged(self) -> bool:
        """Whether its numbers were not finite. Older results of classifiers say so by their cross-entropy alone."""
        names = {self.entry.main_score.name, "cross_entropy"}
        return self.result.get("diverged", False) or any(self.result.get(name, 0) is None for name in names)

    @property
    def data(self) -> str:
        """The data set. Of one's own the path says which they are."""
        name = str(self.config["dataset"])
        if name in OF_ONES_OWN:
            name += f" {self.result.get('data_dir', self.config['data_dir'])}"
        return name

    @property
    def dataset(self) -> str:
        """What it was scored on."""
        return ", ".join(
            [self.data, *(f"{self.result[key]:,} {what}" for key, what in COUNTED.items() if key in self.result)]
        )

    @property
    def arm(self) -> Arm | None:
        """What it is made of, as far as its config and its result tell."""
        layers, steps = self.config.get("num_layers"), self.result.get("step")
        if layers is None or steps is None:
            return None
        config = ConfigDict(self.config)
        num_blocks = self.entry.num_blocks(config)
        return Arm(
            num_layers=index(layers),
            num_blocks=index(num_blocks),
            steps=index(steps),
            is_plain=num_blocks == 1 and config.get("model_type") == self.entry.plain(config).get("model_type"),
            is_grown=bool(config.grow_at or config.begin_from),
            others={field: config.get(field) for field in ALIKE},
        )


@dataclass(frozen=True)
class Group:
    """Runs of one setting. `fields` are those in which the groups of a table differ."""

    dataset: str
    fields: dict[str, Any]
    runs: list[Run]  # with answers
    diverged: list[Run]

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{shown(field)}={shown(value)}" for field, value in self.fields.items()) or "all runs"

    @property
    def seeds(self) -> list[Any]:
        """Of the runs with answers, each once."""
        return list(dict.fromkeys(run.config.get("seed") for run in self.runs))

    @property
    def arm(self) -> Arm | None:
        """That of its first run."""
        return (self.runs or self.diverged)[0].arm

    def by_seed(self, metric: str) -> list[float]:
        """Of each seed that has such a figure the mean of its runs."""
        of_seeds = [[run.result.get(metric) for run in self.runs if run.config.get("seed") == s] for s in self.seeds]
        measured = [[value for value in values if value is not None] for values in of_seeds]
        return [statistics.mean(each) for each in measured if each]

    def mean_and_deviation(self, metric: str) -> tuple[float | None, float | None]:
        """Over the seeds, each the mean of its runs; the sample's standard deviation, where there are two at least.

        No mean where all runs diverged, or none has such a figure.
        """
        values = self.by_seed(metric)
        mean = statistics.mean(values) if values else None
        return mean, statistics.stdev(values) if len(values) > 1 else None


def read(workdir: Path) -> Run:
    """The config and result of a finished run.

    Raises:
      UserError: it is not there, or not what a run writes.
    """
    try:
        return _read(workdir)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"the files in {workdir} are not what a run writes ({brief(error)})") from error


def _read(workdir: Path) -> Run:
    config = read_saved(workdir, CONFIG)
    if config is None:
        raise UserError(f"{workdir} holds no run: --runs takes folders of runs")
    config = complete(config)  # of earlier versions
    try:
        entry = entry_of(ConfigDict(config))
    except UserError as error:
        raise UserError(f"{workdir / CONFIG}: {error}") from error
    main = SHOWN[entry.name].FIGURES[0]
    result = read_result(workdir, RESULT) or read_result(workdir, EVAL)
    if result is None or not (main.name in result or result.get("diverged")):
        raise UserError(f"{workdir} is not finished: it has no {RESULT} with its {main.words}. Run its command again")
    if not _is_sampled_as(config, result):
        raise UserError(
            f"{workdir} was scored with another sampler than its config says: repeat --mode=eval without it"
        )
    if result["mode"] == "train" and not result.get("diverged"):
        images = (read_saved(workdir, DATA) or {}).get("images")
        if images is not None and result["step"] < (steps := count_steps(entry, ConfigDict(config), images).steps):
            raise UserError(f"{workdir} is not finished: its result is of step {result['step']} of {steps}")
    report = read_result(workdir, REPORT) or {}
    if report.get("checkpoint") != result["checkpoint"] or not _is_sampled_as(config, report, "num_inference_steps"):
        report = {}
    by_num_steps = {int(count): accuracy for count, accuracy in report.get("accuracy_by_num_steps", {}).items()}
    run = Run(workdir, entry, config, result, by_num_steps, SHOWN[entry.name].curve(logged(workdir)))
    hash((run.dataset, config.get("seed"), run.arm is None))  # what is missing, or no number, is noticed here
    return run


def _is_sampled_as(config: dict[str, Any], result: dict[str, Any], *but: str) -> bool:
    """Whether a result was made with the config's sampler, `but` for some fields."""
    return all(config.get(field, value) == value or field in but for field, value in result.get("sampler", {}).items())


def group(runs: Sequence[Run], dataset: str) -> list[Group]:
    """The runs of one table by setting, the best first and those without answers last."""
    settings = [{field: value for field, value in run.config.items() if field not in NOT_COMPARED} for run in runs]
    fields = {field for setting in settings for field in setting}
    differing = sorted(field for field in fields if len({json.dumps(each.get(field)) for each in settings}) > 1)
    groups: dict[str, Group] = {}
    for run, setting in zip(runs, settings, strict=True):
        mine = {field: setting.get(field) for field in differing}
        each = groups.setdefault(json.dumps(mine), Group(dataset, mine, [], []))
        (each.diverged if run.is_diverged else each.runs).append(run)
    main = runs[0].entry.main_score

    def rank(each: Group) -> float:
        mean, _ = each.mean_and_deviation(main.name)
        if mean is None:
            return math.inf
        return -mean if main.more_is_better else mean

    return sorted(groups.values(), key=rank)


def scored_on(run: Run, runs: Sequence[Run]) -> str:
    """The data set whose table a run is in. One that was ended while it trained was not scored: it joins the others."""
    others = [each.dataset for each in runs if (each.entry, each.data) == (run.entry, run.data)]
    scored = [dataset for dataset in others if dataset != run.data]
    return scored[0] if run.is_diverged and scored and run.dataset == run.data else run.dataset


def arms_of(groups: Sequence[Group]) -> list[str]:
    """The name of each one's arm; nothing where it has none, or another group has the same."""
    found = [each.arm for each in groups]
    names = iter(names_of_arms([arm for arm in found if arm is not None]))
    named = [next(names) if arm is not None else "" for arm in found]
    return [name if named.count(name) == 1 else "" for name in named]
