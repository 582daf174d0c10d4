"""Experiment summary: Markdown tables and learning curves, every number with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from motip.config.curriculum_file import BASE
from motip.config.experiment_file import Experiment
from motip.evaluation.scores import Scores
from motip.evaluation.seeds import Estimate, difference, estimate
from motip.experiment.arms import ArmResult, StageResult

# Okabe and Ito's colours, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


class Findings:
    """Estimates of the metric over seeds and sequences; the source of every table and curve."""

    def __init__(self, experiment: Experiment, results: Sequence[ArmResult]) -> None:
        self.experiment = experiment
        self.results = list(results)
        self.arms = [arm for arm in experiment.arms if any(each.arm == arm.name for each in self.results)]
        self.metric = experiment.domains.metric

    def seeds(self, *arms: str) -> list[int]:
        """Seeds for which all of these arms have results."""
        return sorted(set.intersection(*({each.seed for each in self.results if each.arm == arm} for arm in arms)))

    def stages(self, arm: str) -> list[str]:
        """Names of an arm's stages, preceded by the base weights if they were scored."""
        return [stage.name for stage in next(each for each in self.results if each.arm == arm).stages]

    def domains(self) -> list[str]:
        """Scored domains, in the order of the curriculum's sources (the keys of a stored result are sorted)."""
        scored = {name for each in self.results for name in each.final.scores}
        sources = self.experiment.curriculum_of(self.arms[0], self.experiment.seeds[0]).sources.values()
        order = dict.fromkeys(source.domain for source in sources)
        return [name for name in order if name in scored] + sorted(scored - order.keys())

    def of(self, arm: str, stage: str, seeds: Sequence[int]) -> list[StageResult]:
        found = {each.seed: each for each in self.results if each.arm == arm}
        return [next(row for row in found[seed].stages if row.name == stage) for seed in seeds]

    def value(self, arm: str, stage: str, domain: str) -> Estimate | None:
        scores = self._scores(arm, stage, domain, self.seeds(arm))
        return estimate(scores, self.metric) if scores else None

    def gain(self, before: tuple[str, str], after: tuple[str, str], domain: str) -> Estimate | None:
        """Change of a domain's metric from one (arm, stage) to another, over the seeds of both."""
        seeds = self.seeds(before[0], after[0])
        first, second = (self._scores(arm, stage, domain, seeds) for arm, stage in (before, after))
        return difference(first, second, self.metric) if first and second else None

    def _scores(self, arm: str, stage: str, domain: str, seeds: Sequence[int]) -> list[Scores]:
        rows = self.of(arm, stage, seeds)
        rows = rows[:1] if stage == BASE or stage.startswith(f"{BASE} of ") else rows  # the same model for every seed
        return [row.scores[domain] for row in rows if domain in row.scores]

    def refused(self, arm: str, domain: str) -> list[int]:
        """Per seed: newborns without a free ID label in a domain, with the final model."""
        return [row.refused.get(domain, 0) for row in self.of(arm, self.stages(arm)[-1], self.seeds(arm))]


def experiment_markdown(findings: Findings) -> str:
    """All tables, with a line of explanation."""
    experiment, metric = findings.experiment, findings.metric
    counts = ", ".join(f"{arm.name} {len(findings.seeds(arm.name))}" for arm in findings.arms)
    parts = [
        f"{metric} in percent, mean over seeds [95 % interval over seeds and sequences]. Seeds per arm: {counts}.",
        "### Final models",
        _table(*_final(findings)),
        f"### Arms against {findings.arms[0].name}, final {metric} on {experiment.judge}",
        _table(*_against(findings)),
    ]
    for arm in findings.arms:
        parts += [f"### {arm.name}: {arm.about or 'stage by stage'}", _table(*_stages(findings, arm.name))]
    return "\n\n".join(parts) + "\n"


def _final(findings: Findings) -> tuple[list[str], list[list[str]]]:
    domains = findings.domains()
    target = findings.experiment.judge
    header = ["arm", "what differs", "steps", *domains, f"refused in {target}"]
    rows = []
    for arm in findings.arms:
        last = findings.stages(arm.name)[-1]
        values = [findings.value(arm.name, last, domain) for domain in domains]
        steps = findings.of(arm.name, last, findings.seeds(arm.name))[0].steps
        refused = ", ".join(map(str, findings.refused(arm.name, target)))
        rows.append([arm.name, arm.about, str(steps), *(_text(value) for value in values), refused])
    return header, rows


def _against(findings: Findings) -> tuple[list[str], list[list[str]]]:
    target, first = findings.experiment.judge, findings.arms[0].name
    rows = []
    for arm in findings.arms[1:]:
        last, own = findings.stages(first)[-1], findings.stages(arm.name)[-1]
        gain = findings.gain((first, last), (arm.name, own), target)
        rows.append([arm.name, arm.about, _text(gain, sign=True), _significance(gain)])
    return ["arm", "what differs", f"difference on {target}", ""], rows


def _stages(findings: Findings, arm: str) -> tuple[list[str], list[list[str]]]:
    domains, names = findings.domains(), findings.stages(arm)
    rows = []
    for number, name in enumerate(names):
        values = [_text(findings.value(arm, name, domain)) for domain in domains]
        changes = []
        if number > 0:
            for domain in domains:
                gain = findings.gain((arm, names[number - 1]), (arm, name), domain)
                changes.append(f"{domain} {_text(gain, sign=True)}")
        rows.append([name, *values, "; ".join(changes)])
    return ["after", *domains, "change by this stage"], rows


def _significance(gain: Estimate | None) -> str:
    """`better` or `worse` if the interval of the difference excludes 0, else `within noise`."""
    if gain is None:
        return "not run"
    if gain.low <= 0.0 <= gain.high:
        return "within noise"
    return "better" if gain.mean > 0 else "worse"


def findings_json(findings: Findings) -> dict[str, Any]:
    """Every estimate as JSON values, by arm, stage and domain."""
    return {
        arm.name: {
            "about": arm.about,
            "seeds": findings.seeds(arm.name),
            "refused": {domain: findings.refused(arm.name, domain) for domain in findings.domains()},
            "stages": {
                stage: {
                    # `each` is the key of version 0.1.
                    domain: {"mean": value.mean, "low": value.low, "high": value.high, "each": list(value.per_seed)}
                    for domain in findings.domains()
                    if (value := findings.value(arm.name, stage, domain)) is not None
                }
                for stage in findings.stages(arm.name)
            },
        }
        for arm in findings.arms
    }


def learning_curves(findings: Findings) -> Figure:
    """A panel per domain: the metric after each stage over the optimiser steps; thin lines are single seeds."""
    domains = findings.domains()
    figure = Figure(figsize=(4.2 * len(domains), 4.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for axis, domain in zip(axes, domains, strict=True):
        for number, arm in enumerate(findings.arms):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            own = [each for each in findings.results if each.arm == arm.name]
            for each in own:
                axis.plot(*_points(each, domain, findings.metric), color=colour, linewidth=0.6, alpha=0.4)
            steps = _points(own[0], domain, findings.metric)[0]
            values = [findings.value(arm.name, stage, domain) for stage in findings.stages(arm.name)]
            means = [value.mean for value in values if value is not None]
            axis.plot(steps, means, color=colour, marker=marker, linewidth=1.8, label=arm.name)
        axis.set_title(domain)
        axis.set_xlabel("training steps after the base weights")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{findings.metric} (%)")
    axes[0].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    return figure


def _points(result: ArmResult, domain: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps, and the metric in percent after so many."""
    stages = [stage for stage in result.stages if domain in stage.scores]
    values = [float(stage.scores[domain].class_averaged[metric] or 0.0) for stage in stages]
    return [stage.steps for stage in stages], values


def _text(value: Estimate | None, sign: bool = False) -> str:
    return "-" if value is None else value.text(sign)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
