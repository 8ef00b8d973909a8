"""Freezing the lowest layers of the towers, so that they are not trained and the backward pass ends above them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.vision_tower import blocks_of


def freeze_layers(model: BridgeTower, *, vision: int, text: int) -> None:
    """Freeze the embeddings and the first layers of the towers.

    Args:
        vision: number of blocks of the vision tower to freeze; 0: none, -1: the whole tower with its last norm.
        text: number of layers of the text tower to freeze; 0: none, -1: the whole tower.

    Raises:
        ConfigError: a tower has fewer layers.
    """
    vit = model.vision_tower.vit
    _freeze(
        "vision", vit, blocks_of(vit), vision, trained_norms=[getattr(vit, name, None) for name in ("ln_post", "norm")]
    )
    encoder = model.text_tower.encoder
    _freeze("text", encoder, encoder.encoder.layer, text, trained_norms=[])


def _freeze(
    name: str, tower: nn.Module, layers: nn.ModuleList, count: int, trained_norms: Iterable[nn.Module | None]
) -> None:
    if not -1 <= count <= len(layers):
        raise ConfigError(
            f"optim.frozen_{name}_layers={count}, but the {name} tower has {len(layers)} layers. Use 0 (none) to "
            f"{len(layers)}, or -1 for the whole tower."
        )
    if count == 0:
        return
    trained = [*layers[count:], *trained_norms] if count > 0 else []
    trained_ids = {id(parameter) for module in trained if module is not None for parameter in module.parameters()}
    for parameter in tower.parameters():
        if id(parameter) not in trained_ids:
            parameter.requires_grad_(False)
