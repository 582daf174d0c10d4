"""Which domains the model of each stage has seen, and which stage taught it each of them."""

from __future__ import annotations

from motip.config import Curriculum, Stage


def scored_sources(curriculum: Curriculum) -> dict[str, list[str]]:
    """Domain to the sources that show it in a val split, in the order of the file."""
    found: dict[str, list[str]] = {}
    for name, source in curriculum.sources.items():
        if "val" in source.splits:
            found.setdefault(source.domain, []).append(name)
    return found


def descent(curriculum: Curriculum, stage: Stage) -> list[Stage]:
    """The stages that the stage's weights come from, oldest first, and the stage itself."""
    chain = [stage]
    while (earlier := curriculum.parent_of(chain[0])) is not None:
        chain.insert(0, earlier)
    return chain


def starts_from_given_weights(stage: Stage) -> bool:
    """Whether a stage without an earlier one starts from trained weights rather than from fresh ones."""
    return stage.initialise is None and bool(stage.weights or stage.config.DETR_PRETRAIN)


def base_domains(curriculum: Curriculum, root: Stage) -> frozenset[str]:
    """Domains that the weights a curriculum starts from have seen.

    `domains.base` says so. Without it they are the listed domains that no stage teaches: the first entry of a stage's
    data is what it teaches, further entries may be replay of what the base weights know. Fresh weights know nothing,
    so with them only domains that no stage trains on at all count, to be scored all the same.
    """
    if curriculum.domains.base is not None:
        return frozenset(curriculum.domains.base)
    entries = 1 if starts_from_given_weights(root) else None
    trained = {_domain(curriculum, mix.source) for stage in curriculum.stages for mix in stage.data[:entries]}
    return frozenset(scored_sources(curriculum)) - trained


def seen_after(curriculum: Curriculum, stage: Stage) -> frozenset[str]:
    """Domains that the stage's model has seen: the base weights' and those any stage up to it trains on."""
    chain = descent(curriculum, stage)
    trained = {_domain(curriculum, mix.source) for each in chain for mix in each.data}
    return base_domains(curriculum, chain[0]) | trained


def learned_from(curriculum: Curriculum, stage: Stage, base: str | None) -> dict[str, str]:
    """Domain to the last stage, up to this one, that taught it.

    A stage teaches the domain of the first entry of its data, and that of a further entry if its model has not seen it
    before. What it replays beside that keeps the stage that taught it.

    Args:
        base: name of the base weights, None where they have no scores.
    """
    chain = descent(curriculum, stage)
    seen = set(base_domains(curriculum, chain[0]))
    learned = dict.fromkeys(sorted(seen), base) if base is not None else {}
    for each in chain:
        trained = list(dict.fromkeys(_domain(curriculum, mix.source) for mix in each.data))
        learned |= {domain: each.name for number, domain in enumerate(trained) if number == 0 or domain not in seen}
        seen.update(trained)
    return {domain: name for domain, name in learned.items() if name is not None}


def _domain(curriculum: Curriculum, source: str) -> str:
    return curriculum.sources[source].domain
