"""The vision tower: a ViT that returns the states of its last layers.

``ClipViT`` is the architecture of OpenAI's and open_clip's own models; ViTs of timm are run as timm has them
(``bridgetower.model.named_vits`` builds both by name).

Shapes: B images, S image side in pixels, P positions (class token first), R registers, N patches, D width, E width
inside an MLP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bridgetower.config.model import CUSTOM, VisionTowerConfig
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.ops import Ops
from bridgetower.model.named_vits import build_named, is_clip_tower


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""

    def forward(self, states: Tensor) -> Tensor:
        """Return the activation, in the shape of the states."""
        return states * torch.sigmoid(1.702 * states)


def is_quick_gelu(activation: nn.Module) -> bool:
    """Return True for our QuickGELU and for open_clip's class of that name, which a named tower has."""
    return type(activation).__name__ == QuickGELU.__name__


class ClipBlock(nn.Module):
    """One pre-norm block of CLIP's ViT, with open_clip's names for its modules."""

    def __init__(self, width: int, num_heads: int, activation: nn.Module, ops: Ops) -> None:
        """Build it with open_clip's initial weights."""
        super().__init__()
        self.ops = ops
        self.ln_1 = nn.LayerNorm(width)
        # Only holds the weights: its own forward pass would copy queries, keys and values.
        self.attn: Any = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ls_1: nn.Module = nn.Identity()
        self.ln_2 = nn.LayerNorm(width)
        expand, contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp: Any = nn.Sequential(OrderedDict(c_fc=expand, gelu=activation, c_proj=contract))
        self.ls_2: nn.Module = nn.Identity()

    @classmethod
    def adopt(cls, block: Any, ops: Ops) -> ClipBlock:
        """Return a block that shares the modules, and so the weights, of an open_clip block."""
        adopted = cls.__new__(cls)
        nn.Module.__init__(adopted)
        adopted.ops = ops
        for name, part in block.named_children():
            adopted.add_module(name, part)
        return adopted

    def forward(self, states_BPD: Tensor) -> Tensor:
        """Return the output of the block, shape (B, P, D)."""
        states_BPD, inner_BPE = self.until_last_matmul(*self.ops.norm(states_BPD, self.ln_1))
        result: Tensor = states_BPD + self.ls_2(self.mlp.c_proj(inner_BPE))
        return result

    def until_last_matmul(self, states_BPD: Tensor, normed_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states after attention, and the input of the block's last matmul, (B, P, E).

        Args:
            normed_BPD: ln_1 of the states.
        """
        attention, mlp, ops = self.attn, self.mlp, self.ops
        joint = attention.in_proj_weight, attention.in_proj_bias
        _, attended_BPD = ops.attend_within_rows(normed_BPD, *joint, attention.num_heads, 0.0)
        if isinstance(self.ls_1, nn.Identity):
            states_BPD, normed_BPD = ops.project_add_norm(states_BPD, attended_BPD, attention.out_proj, self.ln_2, 0.0)
        else:
            states_BPD = states_BPD + self.ls_1(attention.out_proj(attended_BPD))
            states_BPD, normed_BPD = ops.norm(states_BPD, self.ln_2)
        is_quick = is_quick_gelu(mlp.gelu)
        if is_quick or (type(mlp.gelu) is nn.GELU and mlp.gelu.approximate == "none"):
            return states_BPD, ops.activate(normed_BPD, mlp.c_fc, quick=is_quick)[1]
        return states_BPD, mlp.gelu(mlp.c_fc(normed_BPD))


class ClipViT(nn.Module):
    """CLIP's ViT without pooling and projection, with open_clip's names for its modules."""

    def __init__(self, config: VisionTowerConfig, image_size_px: int, ops: Ops) -> None:
        """Build it with the initial weights that open_clip's ViT would have with the same seed.

        Args:
            config: settings of a custom tower.
        """
        super().__init__()
        width, patch, scale = config.width, config.patch_size_px, config.width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size_px // patch) ** 2 + 1, width))
        self.ln_pre: nn.Module = nn.LayerNorm(width)
        activation = QuickGELU if config.activation == "quick_gelu" else nn.GELU
        blocks = [ClipBlock(width, config.num_heads, activation(), ops) for _ in range(config.num_layers)]
        self.transformer: Any = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = nn.LayerNorm(width)
        torch.randn(width, 512)  # open_clip draws its projection here; later layers draw after it

    @classmethod
    def adopt(cls, vit: Any, ops: Ops) -> ClipViT:
        """Return a ViT that shares the modules, and so the weights, of an open_clip ViT."""
        adopted = cls.__new__(cls)
        nn.Module.__init__(adopted)
        adopted.conv1, adopted.ln_pre, adopted.ln_post = vit.conv1, vit.ln_pre, vit.ln_post
        adopted.class_embedding, adopted.positional_embedding = vit.class_embedding, vit.positional_embedding
        blocks = [
            ClipBlock.adopt(block, ops) if type(block).__name__ == "ResidualAttentionBlock" else block
            for block in vit.transformer.resblocks
        ]
        adopted.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        return adopted

    @property
    def blocks(self) -> Any:
        """The transformer blocks, lowest first."""
        return self.transformer["resblocks"]

    def embed(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the class token and the patches with their positions, shape (B, P, D)."""
        # The convolution of patches that do not overlap is a matmul; cuDNN takes ten times as long for it.
        size = self.conv1.kernel_size[0]
        patches_B3YyXx = pixels_B3SS.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches_BNE = patches_B3YyXx.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches_BND = F.linear(patches_BNE, self.conv1.weight.flatten(1), self.conv1.bias)
        class_B1D = self.class_embedding.to(patches_BND.dtype).expand(patches_BND.shape[0], 1, -1)
        return torch.cat([class_B1D, patches_BND], dim=1) + self.positional_embedding.to(patches_BND.dtype)


class HalfEncoded(NamedTuple):
    """The state of a vision tower that has run some of its blocks."""

    states_BPD: Tensor
    """The residual stream after the last block that has run; for a timm tower still the pixels."""
    normed_BPD: Tensor
    """ln_1 of the stream, which the next block reads; meaningful only where ``joins_norms`` is True."""
    num_states: int
    """Number of last layers whose states are returned."""
    recompute: bool
    """Keep only the input of each block, and compute the block again in the backward pass."""
    next_block: int = 0
    """Index of the first block that has not run."""
    outputs: tuple[Tensor, ...] = ()
    """The returned states that are computed so far, lowest first."""

    def joins_norms(self, blocks: Iterable[nn.Module]) -> bool:
        """Return True if a block's last residual sum and the norm that follows are one operation.

        Blocks that are recomputed or have a hook are called as modules instead.
        """
        is_plain = (
            isinstance(block, ClipBlock)
            and isinstance(block.ls_2, nn.Identity)
            and not block._forward_hooks
            and not block._forward_pre_hooks
            for block in blocks
        )
        return not self.recompute and all(is_plain)


class VisionTower(nn.Module):
    """A ViT without its pooling and projection, which BridgeTower never uses.

    A tower without a class token (SigLIP's) gets the mean of its patches as class token, at each layer.
    """

    def __init__(self, config: VisionTowerConfig, image_size_px: int, ops: Ops | None = None) -> None:
        """Build it with random weights.

        Args:
            config: complete (``complete_vision_config``).
            ops: what computes the layers; None: ``choose_ops()``.
        """
        super().__init__()
        self.ops = ops = ops or choose_ops()
        if config.name == CUSTOM:
            self.vit: Any = ClipViT(config, image_size_px, ops)
        else:
            vit = build_named(config.name, image_size_px)
            self.vit = ClipViT.adopt(vit, ops) if is_clip_tower(config) else vit
        del self.vit.blocks[config.num_layers :]

    def forward(self, pixels_B3SS: Tensor, num_states: int, *, recompute: bool = False) -> list[Tensor]:
        """Run all layers once.

        The final norm is applied to a copy of each returned state; the stream that feeds the next layer stays
        un-normed (BridgeTower issue 3: one shared norm for all bridged layers).

        Args:
            pixels_B3SS: normalised.
            num_states: how many of the last layers to return.
            recompute: keep only the input of each block, and compute the block again in the backward pass.

        Returns: the states of the last layers, lowest first, each of shape (B, P, D).
        """
        return self.finish(self.begin(pixels_B3SS, num_states, recompute=recompute))

    def begin(self, pixels_B3SS: Tensor, num_states: int, *, recompute: bool = False) -> HalfEncoded:
        """Run the first third of the blocks; ``finish`` runs the others.

        Between the two calls the caller can launch the text tower, so that the GPU does not wait for the host.
        """
        if not isinstance(self.vit, ClipViT):
            return HalfEncoded(pixels_B3SS, pixels_B3SS, num_states, recompute)
        recompute = recompute and torch.is_grad_enabled()
        states_BPD = self.ops.norm(self.vit.embed(pixels_B3SS), self.vit.ln_pre)[1]
        stream = HalfEncoded(states_BPD, states_BPD, num_states, recompute)
        if stream.joins_norms(self.vit.blocks):
            stream = stream._replace(normed_BPD=self.ops.norm(states_BPD, self.vit.blocks[0].ln_1)[1])
        return self._run_blocks(self.vit, stream, len(self.vit.blocks) // 3)

    def finish(self, stream: HalfEncoded) -> list[Tensor]:
        """Run the other blocks. Returns: the states of the last layers, as ``forward`` does."""
        if isinstance(self.vit, ClipViT):
            return list(self._run_blocks(self.vit, stream, len(self.vit.blocks)).outputs)
        return self._timm_states(stream.states_BPD, stream.num_states, recompute=stream.recompute)

    def _run_blocks(self, vit: ClipViT, stream: HalfEncoded, end: int) -> HalfEncoded:
        """Run blocks up to ``end``.

        A block's last residual sum and the norm that reads it are one operation. That norm is ln_post for a state that
        is returned, else the next block's ln_1. A recomputed block is checkpointed as a whole, so it norms its input
        itself.
        """
        blocks, joins_norms = vit.blocks, stream.joins_norms(vit.blocks)
        states_BPD, normed_BPD, outputs = stream.states_BPD, stream.normed_BPD, [*stream.outputs]
        for index in range(stream.next_block, end):
            block, is_returned = blocks[index], index >= len(blocks) - stream.num_states
            if joins_norms:
                states_BPD, inner_BPE = block.until_last_matmul(states_BPD, normed_BPD)
                layer = vit.ln_post if is_returned else blocks[index + 1].ln_1
                states_BPD, normed_BPD = self.ops.project_add_norm(states_BPD, inner_BPE, block.mlp.c_proj, layer, 0.0)
            else:
                recompute = stream.recompute
                states_BPD = checkpoint(block, states_BPD, use_reentrant=False) if recompute else block(states_BPD)
                if is_returned:
                    states_BPD, normed_BPD = self.ops.norm(states_BPD, vit.ln_post)
            if is_returned:
                outputs.append(normed_BPD)
                if joins_norms and index + 1 < len(blocks):
                    states_BPD, normed_BPD = self.ops.norm(states_BPD, blocks[index + 1].ln_1)
        return stream._replace(states_BPD=states_BPD, normed_BPD=normed_BPD, next_block=end, outputs=tuple(outputs))

    def _timm_states(self, pixels_B3SS: Tensor, num_states: int, *, recompute: bool) -> list[Tensor]:
        vit: Any = self.vit
        vit.set_grad_checkpointing(recompute)
        states = vit.forward_intermediates(
            pixels_B3SS,
            indices=num_states,
            return_prefix_tokens=vit.num_prefix_tokens > 0,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if vit.cls_token is not None:
            return [torch.cat([prefix_BRD, patches_BND], dim=1) for patches_BND, prefix_BRD in states]
        # Without a class token the prefix may still hold registers, none of which represents the image.
        pairs = states if vit.num_prefix_tokens else [(patches_BND, patches_BND[:, :0]) for patches_BND in states]
        return [
            torch.cat([patches_BND.mean(dim=1, keepdim=True), registers_BRD, patches_BND], dim=1)
            for patches_BND, registers_BRD in pairs
        ]


def blocks_of(vit: Any) -> Any:
    """Return the transformer blocks of a tower's ViT, lowest first: a list of modules."""
    return vit.blocks
