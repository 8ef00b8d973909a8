"""BridgeTower whole, in plain torch: towers, bridges, cross-modal layers, heads and the pretraining losses.

Read this file first. It computes the published step in the order in which one explains it, and saves nothing: captions
are padded, an image goes through the vision tower once for each objective, and MLM's head scores every token. The model
that is trained (``bridgetower.model.bridgetower``) has the same ``state_dict`` and gives the same losses and gradients;
tests and ``benchmarks/step.py --against=plain`` compare the two. Weights come from ``load_state_dict``.

Shapes: B pairs, L text tokens, P image positions (the class token, then the patches), N positions of either, M
positions that are attended to, D width, H attention heads, d width of a head, K bridged layers, V vocabulary.
Source: arXiv 2206.08657, whose sections and tables are named below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.batch import PretrainBatch
from bridgetower.config.model import FusionConfig, ModelConfig, TextTowerConfig, VisionTowerConfig

BRIDGE_EPS = 1e-5
PAD_ID = 1


class Parts(nn.Module):
    """Modules and parameters by name, in the order in which they are given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask_BM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(q k / sqrt(d)) v of every head, shape (B, N, D); keys whose mask is False are not seen."""
    query_BHNd, key_BHMd, value_BHMd = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores_BHNM = query_BHNd @ key_BHMd.transpose(2, 3) * query_BHNd.shape[-1] ** -0.5
    if mask_BM is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask_BM[:, None, None, :], torch.finfo(scores_BHNM.dtype).min)
    weights_BHNM = F.dropout(scores_BHNM.softmax(dim=-1), dropout)
    return (weights_BHNM @ value_BHMd).transpose(1, 2).flatten(2)


# ---- Vision tower: CLIP's ViT (section 3.1) ----


class VisionBlock(Parts):
    """One pre-norm transformer block: x + attention(LN(x)), then x + MLP(LN(x)); shape (B, P, D) to the same."""

    def __init__(self, config: VisionTowerConfig) -> None:
        width, self_attention = config.width, nn.MultiheadAttention(config.width, config.num_heads)
        mlp = Parts(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width))
        super().__init__(ln_1=nn.LayerNorm(width), attn=self_attention, ln_2=nn.LayerNorm(width), mlp=mlp)
        self.heads = config.num_heads
        # OpenAI's weights were trained with x * sigmoid(1.702 x); the towers that have it say so in their name.
        is_custom = config.name == "custom"
        self.is_quick = config.activation == "quick_gelu" if is_custom else config.name.endswith("quickgelu")

    def forward(self, states_BPD: Tensor) -> Tensor:
        joint = F.linear(self.ln_1(states_BPD), self.attn.in_proj_weight, self.attn.in_proj_bias)
        states_BPD = states_BPD + self.attn.out_proj(attend(*joint.chunk(3, dim=-1), heads=self.heads))
        inner = self.mlp.c_fc(self.ln_2(states_BPD))
        return states_BPD + self.mlp.c_proj(inner * torch.sigmoid(1.702 * inner) if self.is_quick else F.gelu(inner))


class VisionTower(Parts):
    """A ViT. Returns every block's output, lowest first, (B, P, D); all pass one final norm, as published."""

    def __init__(self, config: VisionTowerConfig, image_size_px: int) -> None:
        width, patch = config.width, config.patch_size_px
        vit = Parts(
            class_embedding=nn.Parameter(torch.zeros(width)),
            positional_embedding=nn.Parameter(torch.zeros((image_size_px // patch) ** 2 + 1, width)),
            conv1=nn.Conv2d(3, width, patch, stride=patch, bias=False),
            ln_pre=nn.LayerNorm(width),
            transformer=Parts(resblocks=nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))),
            ln_post=nn.LayerNorm(width),
        )
        super().__init__(vit=vit)

    def forward(self, pixels_B3SS: Tensor) -> list[Tensor]:
        vit, outputs = self.vit, []
        patches_BND = vit.conv1(pixels_B3SS).flatten(2).transpose(1, 2)
        class_B1D = vit.class_embedding.expand(len(patches_BND), 1, -1)
        states_BPD = vit.ln_pre(torch.cat([class_B1D, patches_BND], dim=1) + vit.positional_embedding)
        for block in vit.transformer.resblocks:
            states_BPD = block(states_BPD)
            outputs.append(vit.ln_post(states_BPD))
        return outputs


# ---- Text tower: RoBERTa (section 3.2) ----


class TextLayer(Parts):
    """One post-norm transformer layer: LN(x + attention(x)), then LN(x + MLP(x)); shape (B, L, D) to the same."""

    def __init__(self, config: TextTowerConfig) -> None:
        def summed(inside: int) -> Parts:
            return Parts(dense=nn.Linear(inside, width), LayerNorm=nn.LayerNorm(width, eps=1e-5))

        width, heads = config.width, {name: nn.Linear(config.width, config.width) for name in ("query", "key", "value")}
        attention = Parts(output=summed(width))
        attention.add_module("self", Parts(**heads))
        intermediate = Parts(dense=nn.Linear(width, 4 * width))
        super().__init__(attention=attention, intermediate=intermediate, output=summed(4 * width))
        self.heads, self.dropout = config.num_heads, nn.Dropout(config.dropout)

    def forward(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        linear, summed, dropout = self.attention.self, self.attention.output, self.dropout.p * self.training
        projections = linear.query(states_BLD), linear.key(states_BLD), linear.value(states_BLD)
        attended_BLD = attend(*projections, heads=self.heads, mask_BM=mask_BL, dropout=dropout)
        states_BLD = summed.LayerNorm(states_BLD + self.dropout(summed.dense(attended_BLD)))
        inner = self.output.dense(F.gelu(self.intermediate.dense(states_BLD)))
        return self.output.LayerNorm(states_BLD + self.dropout(inner))


class TextTower(Parts):
    """A RoBERTa encoder without its pooler. Returns every layer's output, lowest first, (B, L, D)."""

    def __init__(self, config: TextTowerConfig) -> None:
        width = config.width
        embeddings = Parts(
            word_embeddings=nn.Embedding(config.vocabulary_size, width, PAD_ID),
            position_embeddings=nn.Embedding(config.num_positions, width, PAD_ID),
            token_type_embeddings=nn.Embedding(1, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-5),
        )
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        super().__init__(encoder=Parts(embeddings=embeddings, encoder=Parts(layer=layers)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> list[Tensor]:
        table, outputs = self.encoder.embeddings, []
        # A RoBERTa counts positions from its padding id: the first token has position 2.
        is_token_BL = ids_BL != PAD_ID
        position_BL = is_token_BL.cumsum(dim=1) * is_token_BL + PAD_ID
        states_BLD = table.word_embeddings(ids_BL) + table.token_type_embeddings.weight[0]
        states_BLD = self.dropout(table.LayerNorm(states_BLD + table.position_embeddings(position_BL)))
        for layer in self.encoder.encoder.layer:
            states_BLD = layer(states_BLD, mask_BL)
            outputs.append(states_BLD)
        return outputs


# ---- Cross-modal encoder and bridges (section 3.3) ----


class Attention(Parts):
    """LN(x + Dropout(W_o attention(x, context))): self-attention or cross-attention, by its context."""

    def __init__(self, config: FusionConfig) -> None:
        linear = {n: nn.Linear(config.width, config.width) for n in ("query", "key", "value", "output")}
        super().__init__(**linear, norm=nn.LayerNorm(config.width, eps=config.layer_norm_eps))
        self.heads, self.dropout = config.num_heads, nn.Dropout(config.dropout)

    def forward(self, states_BND: Tensor, context_BMD: Tensor, mask_BM: Tensor | None) -> Tensor:
        projections = self.query(states_BND), self.key(context_BMD), self.value(context_BMD)
        dropout = self.dropout.p * self.training
        attended_BND = attend(*projections, heads=self.heads, mask_BM=mask_BM, dropout=dropout)
        return self.norm(states_BND + self.dropout(self.output(attended_BND)))


class FeedForward(Parts):
    """LN(x + Dropout(W_2 GELU(W_1 x)))."""

    def __init__(self, config: FusionConfig) -> None:
        expand, contract = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)
        super().__init__(expand=expand, contract=contract, norm=nn.LayerNorm(config.width, eps=config.layer_norm_eps))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states_BND: Tensor) -> Tensor:
        return self.norm(states_BND + self.dropout(self.contract(F.gelu(self.expand(states_BND)))))


class CrossModalLayer(Parts):
    """One layer of one modality; ``other`` is the other modality, as it entered the layer."""

    def __init__(self, config: FusionConfig) -> None:
        attentions = {"self_attention": Attention(config), "cross_attention": Attention(config)}
        super().__init__(**attentions, feed_forward=FeedForward(config))

    def forward(self, states: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        return self.feed_forward(self.cross_attention(self.self_attention(states, states, mask), other, other_mask))


class Bridge(Parts):
    """How a tower's layer (y) joins the cross-modal layer before (x), (B, N, D) each: the nine forms of Table 1."""

    def __init__(self, config: FusionConfig) -> None:
        width, form = config.width, config.bridge
        parts: dict[str, nn.Module | nn.Parameter] = {"norm": nn.LayerNorm(width, eps=BRIDGE_EPS)}
        if form == "interpolate":
            parts["beta"] = nn.Parameter(torch.full((width,), 0.5))
        elif form in ("gated_interpolate", "linear_concat", "linear_residual"):
            parts["gate" if form == "gated_interpolate" else "linear"] = nn.Linear(2 * width, width)
        elif form == "mlp_concat":
            parts |= {"expand": nn.Linear(2 * width, 2 * width), "contract": nn.Linear(2 * width, width)}
            parts["inner_norm"] = nn.LayerNorm(2 * width, eps=BRIDGE_EPS)
        elif form in ("cross_attention", "cross_attention_ffn"):
            parts = {"attention": Attention(config)}
            parts |= {"feed_forward": FeedForward(config)} if form == "cross_attention_ffn" else {}
        super().__init__(**parts)
        self.form, self.masks_padding = config.bridge, config.bridge_masks_padding

    def forward(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        match self.form:
            case "add":  # (a), the published model
                return self.norm(x + y)
            case "product":  # (b)
                return self.norm(x * y)
            case "interpolate":  # (c)
                return self.norm(self.beta * x + (1 - self.beta) * y)
            case "gated_interpolate":  # (d)
                gate = self.gate(torch.cat([y, x], dim=-1)).sigmoid()
                return self.norm(gate * x + (1 - gate) * y)
            case "linear_concat":  # (e)
                return self.norm(self.linear(torch.cat([y, x], dim=-1)))
            case "mlp_concat":  # (f)
                return self.norm(self.contract(F.gelu(self.inner_norm(self.expand(torch.cat([y, x], dim=-1))))))
            case "linear_residual":  # (i)
                return self.norm(x + y + self.linear(torch.cat([x, y], dim=-1)))
        attended = self.attention(x, y, mask if self.masks_padding else None)  # (g)
        return self.feed_forward(attended) if self.form == "cross_attention_ffn" else attended  # (h)


class CrossModalEncoder(Parts):
    """Both streams. The first bridged layer has a plain norm, each later one a bridge; external layers have neither."""

    def __init__(self, config: FusionConfig) -> None:
        norms = {f"{m}_norm": nn.LayerNorm(config.width, eps=BRIDGE_EPS) for m in ("text", "image")}
        super().__init__(**norms if config.num_bridged else {})
        for m in ("text", "image"):
            bridges = (Bridge(config) for _ in range(config.num_bridged - 1))
            self.add_module(f"{m}_bridges", nn.ModuleList(bridges))
            self.add_module(f"{m}_layers", nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers)))
        self.num_bridged = config.num_bridged

    def forward(self, text_KBLD: Tensor, image_KBPD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        text, image = text_KBLD[0], image_KBPD[0]
        if self.num_bridged:
            text, image = self.text_norm(text), self.image_norm(image)
        for k, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            if 0 < k < self.num_bridged:
                text = self.text_bridges[k - 1](text_KBLD[k], text, mask_BL)
                image = self.image_bridges[k - 1](image_KBPD[k], image, None)
            text, image = text_layer(text, mask_BL, image, None), image_layer(image, None, text, mask_BL)
        return text, image


# ---- The model, its heads and losses (section 3.4) ----


class Fused(NamedTuple):
    """What a pass of the whole model gives: last text states, pooled pair, and the towers' own class tokens."""

    text_BLD: Tensor
    pooled_B2D: Tensor
    text_class_BD: Tensor
    image_class_BD: Tensor


class PlainBridgeTower(Parts):
    """Two towers, the cross-modal encoder, and the heads of MLM, ITM and ITC."""

    def __init__(self, config: ModelConfig, heads: tuple[str, ...] = ("mlm", "itm", "itc")) -> None:
        fusion, text, vision = config.fusion, config.text, config.vision
        super().__init__(vision_tower=VisionTower(vision, config.image_size_px), text_tower=TextTower(text))
        if fusion.multi_layer_fusion:  # METER's, Table 3
            self.text_gate = Parts(linear=nn.Linear(text.width, text.width))
            self.image_gate = Parts(linear=nn.Linear(vision.width, vision.width))
        if fusion.num_layers:  # with none, the towers' own class tokens are pooled (Table 2)
            self.text_transform = nn.Linear(text.width, fusion.width)
            self.image_transform = nn.Linear(vision.width, fusion.width)
            self.modality_embedding = nn.Embedding(2, fusion.width)
            self.cross_modal = CrossModalEncoder(fusion)
        self.text_pooler, self.image_pooler = (nn.Linear(fusion.width, fusion.width) for _ in range(2))
        mlm_norm = nn.LayerNorm(fusion.width, eps=fusion.layer_norm_eps)
        mlm = Parts(transform=nn.Linear(fusion.width, fusion.width), norm=mlm_norm)
        if not config.heads.mlm_tied:  # the published models; tied ones decode with the text tower's word embeddings
            mlm.decoder = nn.Linear(fusion.width, text.vocabulary_size, bias=False)
        mlm.bias = nn.Parameter(torch.zeros(text.vocabulary_size))
        itm = Parts(classifier=nn.Linear(2 * fusion.width, 2))
        itc_text, itc_image = (nn.Linear(tower.width, config.heads.itc_width) for tower in (text, vision))
        itc = Parts(text=itc_text, image=itc_image, temperature=nn.Parameter(torch.full((1,), 0.07)))
        self.heads = Parts(**{name: head for name, head in (("mlm", mlm), ("itm", itm), ("itc", itc)) if name in heads})
        self.config, self.head_names = config, heads

    def forward(self, pixels_B3SS: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Fused:
        fusion, bridged = self.config.fusion, max(1, self.config.fusion.num_bridged)
        images, texts = self.vision_tower(pixels_B3SS), self.text_tower(ids_BL, mask_BL)
        if fusion.multi_layer_fusion:
            image_KBPD, text_KBLD = gated_sum(images, self.image_gate), gated_sum(texts, self.text_gate)
        else:
            image_KBPD, text_KBLD = torch.stack(images[-bridged:]), torch.stack(texts[-bridged:])
        text_BLD, image_BPD = text_KBLD[-1], image_KBPD[-1]
        if fusion.num_layers:
            text_KBLD = self.text_transform(text_KBLD) + self.modality_embedding.weight[0]
            image_KBPD = self.image_transform(image_KBPD) + self.modality_embedding.weight[1]
            text_BLD, image_BPD = self.cross_modal(text_KBLD, image_KBPD, mask_BL)
        pooled = torch.cat([self.text_pooler(text_BLD[:, 0]), self.image_pooler(image_BPD[:, 0])], dim=-1).tanh()
        return Fused(text_BLD, pooled, texts[-1][:, 0], images[-1][:, 0])

    def losses(self, pixels_N3SS: Tensor, batch: PretrainBatch) -> dict[str, Tensor]:
        """Return each objective's loss, which pretraining adds up; ITC compares the pairs of the batch alone.

        Args:
            pixels_N3SS: the batch's pixels, normalised.
        """
        losses, mask_BL, own_B3SS = dict[str, Tensor](), batch.attention_mask_BL, pixels_N3SS[: len(batch.image_id_B)]
        if "mlm" in self.head_names:  # masked caption, own image
            states_BLD, head = self(own_B3SS, batch.masked_ids_BL, mask_BL).text_BLD, self.heads.mlm
            words = self.text_tower.encoder.embeddings.word_embeddings if self.config.heads.mlm_tied else head.decoder
            logits_BLV = F.linear(head.norm(F.gelu(head.transform(states_BLD))), words.weight, head.bias).float()
            logits_MV = logits_BLV.flatten(0, 1)[batch.mlm_index_M]
            losses["mlm"] = F.cross_entropy(logits_MV, batch.mlm_label_M, reduction="none") @ batch.mlm_weight_M
        if "itm" in self.head_names:  # clean caption, own image or another
            pooled_B2D = self(pixels_N3SS[batch.itm_image_B], batch.clean_ids_BL, mask_BL).pooled_B2D
            losses["itm"] = F.cross_entropy(self.heads.itm.classifier(pooled_B2D).float(), batch.itm_label_B)
        if "itc" in self.head_names:  # clean caption and own image, before they meet
            fused, head = self(own_B3SS, batch.clean_ids_BL, mask_BL), self.heads.itc
            text_BC = F.normalize(head.text(fused.text_class_BD).float(), dim=-1)
            image_BC = F.normalize(head.image(fused.image_class_BD).float(), dim=-1)
            target_BB = (batch.image_id_B[:, None] == batch.image_id_B).float()
            target_BB /= target_BB.sum(dim=1, keepdim=True)  # every caption of an image is right
            logits_BB = text_BC @ image_BC.T / head.temperature.float().clamp(0.001, 0.5)
            losses["itc"] = (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2
        return losses


def gated_sum(states: list[Tensor], gate: Parts) -> Tensor:
    """Return METER's fusion of all layers, shape (1, B, N, D): the last one plus a gated sum of the lower ones."""
    lower_KBND = torch.stack(states[:-1])
    return (states[-1] + (gate.linear(lower_KBND).softmax(dim=0) * lower_KBND).sum(dim=0))[None]
