"""Domains that the model of each stage has seen, and the stage in which it learned each of them."""

from __future__ import annotations

from motip.config import Curriculum, Stage


def scored_sources(curriculum: Curriculum) -> dict[str, list[str]]:
    """Domain -> its sources with a val split, in the order of the curriculum file."""
    found: dict[str, list[str]] = {}
    for name, source in curriculum.sources.items():
        if "val" in source.splits:
            found.setdefault(source.domain, []).append(name)
    return found


def ancestry(curriculum: Curriculum, stage: Stage) -> list[Stage]:
    """The stages behind a stage's weights, oldest first, ending with the stage itself."""
    chain = [stage]
    while (earlier := curriculum.parent_of(chain[0])) is not None:
        chain.insert(0, earlier)
    return chain


def starts_from_given_weights(stage: Stage) -> bool:
    """Whether a stage without a parent stage starts from a trained weights file, not from fresh weights."""
    return stage.initialise is None and bool(stage.weights or stage.config.DETR_PRETRAIN)


def base_domains(curriculum: Curriculum, root: Stage) -> frozenset[str]:
    """Domains that the base weights of a curriculum were trained on.

    `domains.base` of the file if given. Else the listed domains that no stage trains on as the first entry of its data;
    further entries may be replay of domains of the base weights. For fresh weights: the domains that no stage trains
    on at all, which are then scored zero-shot.
    """
    if curriculum.domains.base is not None:
        return frozenset(curriculum.domains.base)
    entries = 1 if starts_from_given_weights(root) else None
    trained = {_domain(curriculum, mix.source) for stage in curriculum.stages for mix in stage.data[:entries]}
    return frozenset(scored_sources(curriculum)) - trained


def seen_after(curriculum: Curriculum, stage: Stage) -> frozenset[str]:
    """Domains that the stage's model has seen: the base weights' and those of every stage up to this one."""
    chain = ancestry(curriculum, stage)
    trained = {_domain(curriculum, mix.source) for each in chain for mix in each.data}
    return base_domains(curriculum, chain[0]) | trained


def learned_in(curriculum: Curriculum, stage: Stage, base: str | None) -> dict[str, str]:
    """Domain -> the last stage, up to this one, that learned it.

    A stage learns the domain of the first entry of its data, and that of a further entry if its model has not seen it
    before. Replayed domains keep the stage that learned them.

    Args:
        base: row name of the base weights, None if they have no scores.
    """
    chain = ancestry(curriculum, stage)
    seen = set(base_domains(curriculum, chain[0]))
    learned = dict.fromkeys(sorted(seen), base) if base is not None else {}
    for each in chain:
        trained = list(dict.fromkeys(_domain(curriculum, mix.source) for mix in each.data))
        learned |= {domain: each.name for number, domain in enumerate(trained) if number == 0 or domain not in seen}
        seen.update(trained)
    return {domain: name for domain, name in learned.items() if name is not None}


def _domain(curriculum: Curriculum, source: str) -> str:
    return curriculum.sources[source].domain
