"""The vision tower: a ViT of open_clip or timm that gives the states of its last layers.

Shapes: B images, S image side in pixels, P positions (class token first), R registers, N patches, D width.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import open_clip
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIPVisionCfg
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bridgetower.config.model import CUSTOM, VisionTowerConfig
from bridgetower.errors import ConfigError
from bridgetower.kernels import ops as fused
from bridgetower.kernels.ops import expand, norm, project_add_norm
from bridgetower.kernels.spans import attend_within_rows
from bridgetower.model.init import shapes_alone
from bridgetower.model.named_sizes import fill_sizes

_TIMM_VITS = (timm.models.VisionTransformer, timm.models.Eva, timm.models.VisionTransformerRelPos)
LIST_MODELS = "`python -c 'import open_clip; print(open_clip.list_models())'`"


class VisionTower(nn.Module):
    """A ViT without its pooling and projection, which BridgeTower never uses.

    A tower without a class token (SigLIP's) gets the mean of its patches in that place, at each layer.
    """

    uses_kernels = True

    def __init__(self, config: VisionTowerConfig, image_size_px: int) -> None:
        """Build it with random weights.

        Args:
            config: complete (``complete_vision_config``).
        """
        super().__init__()
        self.vit = _build_vit(config, image_size_px)
        blocks = blocks_of(self.vit)
        del blocks[config.num_layers :]
        for block in blocks:
            efficient_block(block)

    def forward(
        self,
        pixels_B3SS: Tensor,
        num_states: int,
        *,
        recompute: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        """Run all layers once.

        The final norm is applied to a copy of each state handed out; the stream that feeds the next layer stays
        un-normed (BridgeTower issue 3: one shared norm for all bridged layers).

        Args:
            pixels_B3SS: normalised.
            num_states: how many of the last layers to hand out.
            recompute: keep only what enters a block.
            meanwhile: called once, after a third of the blocks where these are open_clip's.

        Returns: their states, first bridged layer first, each of shape (B, P, D).
        """
        if isinstance(self.vit, VisionTransformer):
            recompute = recompute and torch.is_grad_enabled()
            return self._clip_states(self.vit, pixels_B3SS, num_states, recompute, meanwhile)
        if meanwhile is not None:
            meanwhile()
        self.vit.set_grad_checkpointing(recompute)
        states = self.vit.forward_intermediates(
            pixels_B3SS,
            indices=num_states,
            return_prefix_tokens=self.vit.num_prefix_tokens > 0,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if self.vit.cls_token is not None:
            return [torch.cat([prefix_BRD, patches_BND], dim=1) for patches_BND, prefix_BRD in states]
        # Without a class token there may be registers, of which none stands for the image.
        pairs = states if self.vit.num_prefix_tokens else [(patches_BND, patches_BND[:, :0]) for patches_BND in states]
        return [
            torch.cat([patches_BND.mean(dim=1, keepdim=True), registers_BRD, patches_BND], dim=1)
            for patches_BND, registers_BRD in pairs
        ]

    def _clip_states(
        self,
        vit: VisionTransformer,
        pixels_B3SS: Tensor,
        num_states: int,
        recompute: bool,
        meanwhile: Callable[[], None] | None,
    ) -> list[Tensor]:
        patches_BND = _embed_patches(vit.conv1, pixels_B3SS)
        class_B1D = vit.class_embedding.to(patches_BND.dtype).expand(patches_BND.shape[0], 1, -1)
        states_BPD = torch.cat([class_B1D, patches_BND], dim=1) + vit.positional_embedding.to(patches_BND.dtype)
        kernels = self.uses_kernels
        states_BPD = norm(states_BPD, vit.ln_pre, kernels=kernels)[1]
        blocks = list(vit.transformer.resblocks)
        # A block's last sum and the norm after it are one kernel, unless blocks are computed, or compiled, one by one.
        joins = kernels and fused.fits(states_BPD) and not recompute and all(map(_can_be_joined, blocks))
        normed_BPD = states_BPD
        if joins:
            states_BPD, normed_BPD = norm(states_BPD, blocks[0].ln_1, kernels=kernels)
        handed_out = []
        for number, block in enumerate(blocks):
            if meanwhile is not None and number == len(blocks) // 3:
                meanwhile()
            is_handed_out, is_last = number >= len(blocks) - num_states, number == len(blocks) - 1
            if joins:
                states_BPD, inner = block.until_last_product(states_BPD, normed_BPD)
                layer = vit.ln_post if is_handed_out else blocks[number + 1].ln_1
                states_BPD, normed_BPD = project_add_norm(
                    states_BPD, inner, block.mlp.c_proj, layer, 0.0, kernels=kernels
                )
            else:
                states_BPD = checkpoint(block, states_BPD, use_reentrant=False) if recompute else block(states_BPD)
                if is_handed_out:
                    states_BPD, normed_BPD = norm(states_BPD, vit.ln_post, kernels=kernels)
            if is_handed_out:
                handed_out.append(normed_BPD)
                if joins and not is_last:
                    states_BPD, normed_BPD = norm(states_BPD, blocks[number + 1].ln_1, kernels=kernels)
        return handed_out


def _embed_patches(conv: nn.Conv2d, pixels_B3SS: Tensor) -> Tensor:
    """The convolution of patches that do not overlap as the product that it is: cuDNN takes ten times as long."""
    size = conv.kernel_size[0]
    patches_B3YyXx = pixels_B3SS.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    patches_BNE = patches_B3YyXx.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches_BNE, conv.weight.flatten(1), conv.bias)


class _Block(ResidualAttentionBlock):  # type: ignore[misc]
    """open_clip's, without the copies that nn.MultiheadAttention makes of queries, keys and values."""

    uses_kernels = True

    def forward(self, states_BPD: Tensor, k_x: None = None, v_x: None = None, attn_mask: None = None) -> Tensor:
        """As open_clip's in a vision tower, where nothing else is attended to and nothing is masked."""
        assert k_x is None and v_x is None and attn_mask is None
        states_BPD, inner = self.until_last_product(*norm(states_BPD, self.ln_1, kernels=self.uses_kernels))
        result: Tensor = states_BPD + self.ls_2(self.mlp.c_proj(inner))
        return result

    def until_last_product(self, states_BPD: Tensor, normed_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """The states after attention, and what its last product is of.

        Args:
            normed_BPD: ln_1 of the states.
        """
        attention, mlp, kernels = self.attn, self.mlp, self.uses_kernels
        joined = attention.in_proj_weight, attention.in_proj_bias
        _, attended_BPD = attend_within_rows(normed_BPD, *joined, attention.num_heads, 0.0, kernels=kernels)
        if isinstance(self.ls_1, nn.Identity):
            states_BPD, normed_BPD = project_add_norm(
                states_BPD, attended_BPD, attention.out_proj, self.ln_2, 0.0, kernels=kernels
            )
        else:
            states_BPD = states_BPD + self.ls_1(attention.out_proj(attended_BPD))
            states_BPD, normed_BPD = norm(states_BPD, self.ln_2, kernels=kernels)
        if isinstance(mlp.gelu, QuickGELU) or (type(mlp.gelu) is nn.GELU and mlp.gelu.approximate == "none"):
            _, inner = expand(normed_BPD, mlp.c_fc, quick=isinstance(mlp.gelu, QuickGELU), kernels=kernels)
        else:
            inner = mlp.gelu(mlp.c_fc(normed_BPD))
        return states_BPD, inner


def _can_be_joined(block: nn.Module) -> bool:
    is_plain = isinstance(block, _Block) and isinstance(block.ls_2, nn.Identity)
    return is_plain and block._compiled_call_impl is None and not block._forward_hooks and not block._forward_pre_hooks


def efficient_block(block: nn.Module) -> None:
    """Give a block of open_clip's that forward pass, in place; other blocks stay as they are."""
    if type(block) is ResidualAttentionBlock:
        block.__class__ = _Block


def blocks_of(vit: Any) -> Any:
    """The transformer blocks of a ViT, lowest first: a list of modules."""
    return vit.transformer.resblocks if _is_clip(vit) else vit.blocks


def _is_clip(vit: Any) -> bool:
    return isinstance(vit, VisionTransformer)


def is_clip_tower(config: VisionTowerConfig) -> bool:
    """True for OpenCLIP's own ViTs, false for timm's.

    Raises:
        ConfigError: the name is not open_clip's.
    """
    return config.name == CUSTOM or "timm_model_name" not in _model_config(config.name)["vision_cfg"]


def complete_vision_config(config: VisionTowerConfig) -> VisionTowerConfig:
    """Fill in the sizes that a name stands for.

    Raises:
        ConfigError: the name is not open_clip's, is not of a ViT whose states can be bridged, or a size that is given
            is not the named tower's.
    """
    if config.name == CUSTOM:
        return config
    return fill_sizes(config, "model.vision", _facts(config.name))


@lru_cache
def _facts(name: str) -> dict[str, int]:
    """Sizes of a named ViT, read from the model itself, on torch's meta device."""
    with shapes_alone():
        vit: Any = _build_named(name, None)
    blocks = blocks_of(vit)
    clip = _is_clip(vit)
    return {
        "patch_size_px": int(vit.patch_size[0] if clip else vit.patch_embed.feat_ratio(as_scalar=True)),
        "width": int(vit.conv1.out_channels if clip else vit.embed_dim),
        "num_layers": len(blocks),
        "num_heads": int(blocks[0].attn.num_heads),
    }


def _build_vit(config: VisionTowerConfig, image_size_px: int) -> Any:
    if config.name != CUSTOM:
        return _build_named(config.name, image_size_px)
    vit = VisionTransformer(
        image_size=image_size_px,
        patch_size=config.patch_size_px,
        width=config.width,
        layers=config.num_layers,
        heads=config.num_heads,
        mlp_ratio=4.0,
        act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        norm_layer=LayerNorm,
    )
    vit.proj = None
    return vit


def _build_named(name: str, image_size_px: int | None) -> Any:
    """The image tower of an open_clip model without what comes after its last block's norm.

    Args:
        image_size_px: None takes the model's own.
    """
    model_config = _model_config(name)
    cfg = CLIPVisionCfg(**model_config["vision_cfg"])
    if cfg.timm_model_name:
        return _build_timm(name, cfg.timm_model_name, image_size_px)
    if isinstance(cfg.layers, (list, tuple)):
        raise _unfit(name, "its image tower is a ResNet, whose layers have different shapes")
    if cfg.attentional_pool and model_config["embed_dim"] != cfg.width:
        raise _unfit(name, "the only norm after its blocks is one of the attention pool's output, of another width")
    size = {} if image_size_px is None else {"image_size": image_size_px}
    vit = open_clip.model._build_vision_tower(
        model_config["embed_dim"],
        dataclasses.replace(cfg, attentional_pool=False, patch_dropout=0.0, **size),
        quick_gelu=model_config.get("quick_gelu", False),
    )
    vit.proj = None
    return vit


def _build_timm(name: str, timm_name: str, image_size_px: int | None) -> Any:
    size: dict[str, Any] = {} if image_size_px is None else {"img_size": image_size_px}
    # No pooling, so that the norm comes after the last block and not after the pool.
    vit = timm.create_model(timm_name, pretrained=False, num_classes=0, global_pool="", **size)
    if not isinstance(vit, _TIMM_VITS):
        raise _unfit(name, f"its image tower is timm's {timm_name}, a {type(vit).__name__} and no plain ViT")
    return vit


def _model_config(name: str) -> dict[str, Any]:
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ConfigError(
            f"model.vision.name={name} is no model of open_clip. Near it are: {', '.join(near) or 'none'}; "
            f"{LIST_MODELS} lists all, and {CUSTOM} takes the sizes from the settings."
        )
    found: dict[str, Any] = open_clip.get_model_config(name)
    return found


def _unfit(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model.vision.name={name} cannot be bridged: {reason}. BridgeTower reads the states of a ViT's blocks. What "
        "fits: open_clip's ViT-*, EVA*, PE-*, MobileCLIP-B and *-SigLIP* models, e.g. ViT-B-16-quickgelu or "
        "ViT-B-16-SigLIP2."
    )


def pixel_statistics(config: VisionTowerConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel that a tower's pixels are normalised with: those of its weights.

    Without weights they are those of the first weights that open_clip lists for the name; a custom tower's are CLIP's.
    """
    tags = [] if config.name == CUSTOM else open_clip.list_pretrained_tags_by_model(config.name)
    if not tags:
        return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    tag = config.weights if config.weights in tags else tags[0]
    trained = open_clip.get_pretrained_cfg(config.name, tag)
    return tuple(trained.get("mean", OPENAI_DATASET_MEAN)), tuple(trained.get("std", OPENAI_DATASET_STD))
