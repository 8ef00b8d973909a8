"""Cost of the heads and losses of a pretraining step, a formula per objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bridgetower.cost.shapes import StepShapes
from bridgetower.cost.unknown import no_formula
from bridgetower.cost.work import PartCost, Work

FILE = "bridgetower/cost/heads.py"


def _mlm(shapes: StepShapes) -> Work:
    costs, width, vocabulary_size = shapes.fusion_costs, shapes.config.fusion.width, shapes.config.text.vocabulary_size
    num_masked = sum(shapes.masked)
    work = costs.states(num_masked, 3 * width) + costs.norm(num_masked, width)
    work += costs.linear(num_masked, width, width) + costs.linear(num_masked, width, vocabulary_size)
    return work + Work(kept=4 * num_masked * vocabulary_size)  # log-probabilities in float32


def _itm(shapes: StepShapes) -> Work:
    """Poolers of both modalities, and two classes."""
    costs, width, num_pairs = shapes.fusion_costs, shapes.config.fusion.width, shapes.num_pairs
    work = costs.states(num_pairs, 4 * width) + costs.linear(num_pairs, width, 2 * width)
    return work + costs.linear(num_pairs, 2 * width, 2)


def _itc(shapes: StepShapes) -> Work:
    costs, config, num_pairs = shapes.fusion_costs, shapes.config, shapes.num_pairs
    width, num_contrasted = config.heads.itc_width, shapes.num_contrasted
    work = costs.states(num_pairs, config.text.width + config.vision.width)
    work += costs.linear(num_pairs, config.text.width, width) + costs.linear(num_pairs, config.vision.width, width)
    # In float32: embeddings before and after their norm, those of all ranks; logits, log-probabilities and targets.
    embeddings, logits = (4 * num_pairs + 2 * num_contrasted) * width, 5 * num_pairs * num_contrasted
    return work + Work(kept=4 * (embeddings + logits)) + costs.linear(num_pairs, width, 2 * num_contrasted)


_FORMULAS: Mapping[str, Callable[[StepShapes], Work]] = {"mlm": _mlm, "itm": _itm, "itc": _itc}


def heads_cost(shapes: StepShapes) -> PartCost:
    """Return the cost of the heads and losses of all active objectives.

    Raises:
        ConfigError: there is no formula for an objective.
    """
    work = Work()
    for name in shapes.objectives.heads:
        if name not in _FORMULAS:
            raise no_formula("objective", name, FILE, _FORMULAS)
        work += _FORMULAS[name](shapes)
    return PartCost(work.kept, 0, work.forward, work.backward, 0, {"heads": work.forward + work.backward})
