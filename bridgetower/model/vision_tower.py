"""The vision tower: an open_clip ViT that gives the states of its last layers.

Shapes: B images, S image side in pixels, P positions (class token first), D width.
"""

from __future__ import annotations

import torch
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from torch import Tensor, nn

from bridgetower.config.schema import VisionTowerConfig


class VisionTower(nn.Module):
    """open_clip's ViT without its projection, which BridgeTower never uses."""

    def __init__(self, config: VisionTowerConfig, image_size_px: int) -> None:
        """Build it with random weights."""
        super().__init__()
        self.vit = VisionTransformer(
            image_size=image_size_px,
            patch_size=config.patch_size_px,
            width=config.width,
            layers=config.num_layers,
            heads=config.num_heads,
            mlp_ratio=4.0,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
            norm_layer=LayerNorm,
        )
        self.vit.proj = None

    def forward(self, pixels_B3SS: Tensor, num_states: int) -> list[Tensor]:
        """Run all layers once.

        The final norm is applied to a copy of each state handed out; the stream that feeds the next layer stays
        un-normed (BridgeTower issue 3: one shared norm for all bridged layers).

        Args:
            pixels_B3SS: normalised.
            num_states: how many of the last layers to hand out.

        Returns: their states, first bridged layer first, each of shape (B, P, D).
        """
        vit = self.vit
        patches_BPD = vit.conv1(pixels_B3SS).flatten(2).transpose(1, 2)
        class_B1D = vit.class_embedding.to(patches_BPD.dtype).expand(patches_BPD.shape[0], 1, -1)
        states_BPD = torch.cat([class_B1D, patches_BPD], dim=1) + vit.positional_embedding.to(patches_BPD.dtype)
        states_BPD = vit.ln_pre(states_BPD)
        blocks = list(vit.transformer.resblocks)
        handed_out = []
        for number, block in enumerate(blocks):
            states_BPD = block(states_BPD)
            if number >= len(blocks) - num_states:
                handed_out.append(vit.ln_post(states_BPD))
        return handed_out
