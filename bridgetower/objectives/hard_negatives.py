"""Hard negatives for ITM: wrong partners that the ITC embeddings consider similar.

Shapes: B pairs, G pairs per group, X groups, C contrastive width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HardNegatives(NamedTuple):
    """A wrong image and a wrong text for each pair."""

    image_B: Tensor
    """int64; row of the image that the pair's text is matched with."""
    text_B: Tensor
    """int64; row of the text that the pair's image is matched with."""
    has_any_B: Tensor
    """bool; False where all pairs of the group show one image: ``image_B`` and ``text_B`` then hold the pair itself."""


@torch.no_grad()
def hard_negatives(
    text_BC: Tensor, image_BC: Tensor, image_id_B: Tensor, draw_B2: Tensor, temperature: Tensor, group_size: int
) -> HardNegatives:
    """Draw an image for each text and a text for each image, more often where their similarity is high.

    Negatives are drawn_rows within groups of consecutive pairs, so that they do not depend on how a batch is split over
    ranks. True partners are masked before the softmax and can never be drawn_rows.

    Args:
        text_BC: unit vectors, float32.
        image_BC: unit vectors, float32.
        image_id_B: equal for pairs that show the same image.
        draw_B2: float64 in [0, 1); random numbers for each pair's negative image and for its negative text.
        temperature: shape (1,).
        group_size: divides B.

    Source: ALBEF, arXiv 2107.07651, section 3.2, within the micro-batch as in microsoft/BridgeTower.
    """
    text_XGC, image_XGC = text_BC.unflatten(0, (-1, group_size)), image_BC.unflatten(0, (-1, group_size))
    id_XG = image_id_B.unflatten(0, (-1, group_size))
    is_match_XGG = id_XG[:, :, None] == id_XG[:, None, :]
    similarity_XGG = (text_XGC.double() @ image_XGC.double().transpose(1, 2)) / temperature.double()
    has_any_B = ~is_match_XGG.all(dim=2).flatten()
    pair_B = torch.arange(len(image_id_B), device=image_id_B.device)
    group_start_B = pair_B // group_size * group_size
    drawn_rows = []
    for side, scores_XGG in enumerate((similarity_XGG, similarity_XGG.transpose(1, 2))):
        weight_BG = scores_XGG.masked_fill(is_match_XGG, float("-inf")).softmax(dim=2).flatten(0, 1)
        # Inverse transform sampling: the first candidate at which the running sum exceeds the random number. Comparing
        # with > never picks a candidate of weight 0; 1 - 1e-12 keeps the bound below the last sum despite rounding.
        sum_BG = weight_BG.cumsum(dim=1)
        bound_B1 = draw_B2[:, side : side + 1] * sum_BG[:, -1:] * (1 - 1e-12)
        column_B = (sum_BG > bound_B1).int().argmax(dim=1)
        drawn_rows.append(torch.where(has_any_B, group_start_B + column_B, pair_B))
    return HardNegatives(drawn_rows[0], drawn_rows[1], has_any_B)
