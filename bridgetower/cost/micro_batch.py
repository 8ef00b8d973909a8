"""What one micro-batch costs a GPU, from shapes alone: bytes kept for the backward pass, and operations.

No model is built and nothing is run. docs/plan.md explains the formulas; they stand in towers.py, fusion.py, bridges.py
and heads.py, which are made of those of layers.py.
"""

from __future__ import annotations

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.fusion import fusion_cost
from bridgetower.cost.heads import heads_cost
from bridgetower.cost.shapes import StepShapes, find_shapes
from bridgetower.cost.sizes import check_activation, check_formula, num_image_positions, num_read_states
from bridgetower.cost.towers import CountedVision, counted_vision_cost, text_cost, vision_cost
from bridgetower.cost.work import CUDA, OperatorMemory, PartCost, StepCost


def count_micro_batch(
    config: ModelConfig,
    objectives: ObjectivesConfig,
    compute: ComputeConfig,
    captions: CaptionLengths,
    *,
    element_bytes: int,
    memory: OperatorMemory = CUDA,
    num_images: int = 0,
    num_frozen: tuple[int, int] = (0, 0),
    num_contrasted: int = 0,
) -> StepCost:
    """Count the forward and the backward pass of one micro-batch.

    Args:
        config: complete.
        compute: bytes are those of the step that is not compiled.
        element_bytes: bytes of an element of weights and states: 2 in bfloat16, 4 in float32.
        num_images: images of the pairs, and those that are there only as negatives; 0: one per pair.
        num_frozen: lowest layers of the vision and the text tower that are not trained; -1 is a whole tower.
        num_contrasted: pairs of all ranks' micro-batches, for ITC; 0: those of this micro-batch.

    Raises:
        ConfigError: there is no formula for something in the model.
    """
    check_formula(config.vision)
    check_activation(config.text)
    shapes = find_shapes(
        config,
        objectives,
        compute,
        captions,
        element_bytes=element_bytes,
        memory=memory,
        num_images=num_images,
        num_frozen=num_frozen,
        num_contrasted=num_contrasted,
        positions=num_image_positions(config),
    )
    return _step_cost(shapes, vision_cost(shapes))


def count_operations(
    config: ModelConfig,
    objectives: ObjectivesConfig,
    captions: CaptionLengths,
    counted_vision: CountedVision | None = None,
) -> int:
    """Count the operations of one micro-batch, forward and backward, with nothing recomputed.

    Args:
        config: complete.
        counted_vision: the vision tower, if its layers have no formula.

    Raises:
        ConfigError: there is no formula for something in the model.
    """
    if counted_vision is None:
        check_formula(config.vision)
    shapes = find_shapes(
        config,
        objectives,
        ComputeConfig(),
        captions,
        element_bytes=0,
        memory=CUDA,
        num_images=0,
        num_frozen=(0, 0),
        num_contrasted=0,
        positions=num_image_positions(config) if counted_vision is None else counted_vision.positions,
    )
    vision = vision_cost(shapes) if counted_vision is None else counted_vision_cost(shapes, counted_vision)
    return _step_cost(shapes, vision).work


def _step_cost(shapes: StepShapes, vision: PartCost) -> StepCost:
    config, element, width = shapes.config, shapes.fusion_costs.element, shapes.config.fusion.width
    parts = {"vision": vision, "text": text_cost(shapes), "fusion": fusion_cost(shapes), "heads": heads_cost(shapes)}
    num_bridged = num_read_states(config, 1)  # METER's gate makes one of all layers
    bridged_rows = shapes.image_grid.tokens + shapes.num_texts * sum(shapes.lengths)
    decoder_elements = config.text.vocabulary_size * width if "mlm" in shapes.objectives.heads else 0
    return StepCost(
        parts=parts,
        bridged=num_bridged * bridged_rows * width * element,
        passing=4 * shapes.rows * shapes.positions * width * element,
        first_gradient=decoder_elements * element,
    )
