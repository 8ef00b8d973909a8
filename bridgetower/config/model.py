"""Settings of the model: towers, cross-modal encoder and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bridgetower.config.checks import check_fraction, check_positive
from bridgetower.errors import ConfigError

CUSTOM = "custom"
"""Name of a tower that is given by its sizes, not by a model that exists."""


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        fitting = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads in (32, 48, 64, 96)]
        raise ConfigError(
            f"{name}.width={width} does not divide into {name}.num_heads={num_heads}. "
            f"Heads of 32 to 96 channels: num_heads={' or '.join(map(str, fitting[::-1])) or 1}."
        )


def _check_sizes(section: str, name: str, sizes: Mapping[str, int]) -> None:
    """Sizes of a custom tower must be given; those of a named one may be (0 takes the model's)."""
    for field_name, value in sizes.items():
        if value < 0 or (value == 0 and name == CUSTOM):
            raise ConfigError(
                f"{section}.{field_name}={value} must be greater than 0. A tower with {section}.name={CUSTOM} is "
                f"given by {', '.join(sizes)}; for one that exists give its name."
            )


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """The vision tower: any ViT of open_clip, or one of other sizes."""

    name: str = "ViT-B-16-quickgelu"
    """open_clip's name of a model, whose image tower is taken; or custom, a CLIP ViT of the sizes below."""
    weights: str = "none"
    """none = random; openai or another tag that open_clip lists for the name (needs the hub or its cache), or a file
    of weights of that model."""
    num_layers: int = 0
    """Transformer blocks; 0 = all of the named tower. Fewer leaves out its last ones (the original METER has 11)."""
    patch_size_px: int = 0
    """Side of a patch; must divide model.image_size_px. 0 = the named tower's."""
    width: int = 0
    """Channels of the states. 0 = the named tower's."""
    num_heads: int = 0
    """Attention heads. 0 = the named tower's."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of a custom tower: quick_gelu in OpenAI's CLIP, gelu in most of open_clip's own. A name decides it itself."""

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("patch_size_px", "width", "num_layers", "num_heads")}
        _check_sizes("model.vision", self.name, sizes)
        if self.width and self.num_heads:
            _check_heads("model.vision", self.width, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The text tower: any RoBERTa-like encoder of transformers, or one of other sizes."""

    name: str = "roberta-base"
    """A RoBERTa, XLM-R, DistilRoBERTa, CamemBERT or BERT: a name of the hub, or a folder with its config.json; or
    custom, a RoBERTa of the sizes below."""
    tokenizer: str = "roberta"
    """roberta (its exact vocabulary, shipped), emoji (the demo's), or a folder with tokenizer.json, or with vocab.json
    and merges.txt."""
    weights: str = "none"
    """none = random; a transformers model name or local folder, e.g. roberta-base."""
    max_tokens: int = 50
    """Longer captions lose their end; <s> and </s> count."""
    num_layers: int = 0
    """Transformer layers. 0 = all of the named tower; fewer leaves out its last ones."""
    vocabulary_size: int = 0
    """Ids of the tokenizer. 0 = the named tower's."""
    width: int = 0
    """Channels of the states. 0 = the named tower's."""
    num_heads: int = 0
    """Attention heads. 0 = the named tower's."""
    num_positions: int = 0
    """Rows of the position table; a RoBERTa's first token takes row 2, so it reads num_positions - 2 tokens.
    0 = the named tower's."""
    dropout: float = 0.1
    """On hidden states and attention probabilities."""

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("vocabulary_size", "width", "num_layers", "num_heads", "num_positions")}
        _check_sizes("model.text", self.name, sizes)
        if self.width and self.num_heads:
            _check_heads("model.text", self.width, self.num_heads)
        check_fraction("model.text.dropout", self.dropout)
        if self.max_tokens < 3 or (self.name == CUSTOM and self.max_tokens > self.num_positions - 2):
            raise ConfigError(
                f"model.text.max_tokens={self.max_tokens} must be from 3 (<s>, a word, </s>) to "
                f"model.text.num_positions - 2 = {self.num_positions - 2}."
            )


BridgeForm = Literal[
    "add",
    "product",
    "interpolate",
    "gated_interpolate",
    "linear_concat",
    "mlp_concat",
    "cross_attention",
    "cross_attention_ffn",
    "linear_residual",
]
"""The rows (a) to (i) of the paper's Table 1, in its order."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """The cross-modal encoder and its bridges."""

    width: int = 768
    """Channels of the cross-modal states."""
    num_layers: int = 6
    """Cross-modal layers of each modality. 0 pools the towers' own class tokens (Table 2)."""
    num_external_layers: int = 0
    """The last so many of them have no bridge and read no tower (Table 3); all of them external is METER."""
    num_heads: int = 12
    """Attention heads."""
    dropout: float = 0.1
    """On attention probabilities, attention outputs and feed-forward output."""
    layer_norm_eps: float = 1e-12
    """Of the cross-modal layers and the MLM head. 1e-12 as published; 1e-5 in Hugging Face's port."""
    bridge: BridgeForm = "add"
    """How a tower layer joins the cross-modal layer: Table 1 (a) add, the published model, (b) product,
    (c) interpolate, (d) gated_interpolate, (e) linear_concat, (f) mlp_concat, (g) cross_attention,
    (h) cross_attention_ffn, (i) linear_residual."""
    bridge_masks_padding: bool = True
    """cross_attention and cross_attention_ffn do not look at padding; false looks, as the authors' code did. A step
    then computes padding, to the longest caption of the micro-batch, whatever compute.pack_text says."""
    multi_layer_fusion: bool = False
    """METER's: a gated sum of all layers of a tower takes the place of its last one. Needs all layers external."""

    def __post_init__(self) -> None:
        check_positive(model__fusion__width=self.width, model__fusion__layer_norm_eps=self.layer_norm_eps)
        _check_heads("model.fusion", self.width, self.num_heads)
        check_fraction("model.fusion.dropout", self.dropout)
        if self.num_layers < 0:
            raise ConfigError(f"model.fusion.num_layers={self.num_layers} must be 0 or more; the paper has 6.")
        if not 0 <= self.num_external_layers <= self.num_layers:
            raise ConfigError(
                f"model.fusion.num_external_layers={self.num_external_layers} must be from 0 to "
                f"model.fusion.num_layers={self.num_layers}, as it counts the last of them."
            )
        if self.multi_layer_fusion and (self.num_bridged or not self.num_layers):
            raise ConfigError(
                "model.fusion.multi_layer_fusion=True gives the cross-modal layers one state of each tower, but "
                f"{self.num_bridged} of model.fusion.num_layers={self.num_layers} are bridged to a layer of their own. "
                f"Use --model.fusion.num_external_layers={self.num_layers or 6} with as many layers, or switch it off."
            )

    @property
    def sees_padding(self) -> bool:
        """Whether padding changes what is computed for real tokens, so that it may not be left out."""
        has_attention = self.bridge in ("cross_attention", "cross_attention_ffn")
        return has_attention and self.num_bridged > 1 and not self.bridge_masks_padding

    @property
    def num_bridged(self) -> int:
        """Cross-modal layers that read a tower layer of their own, and so the number of bridged tower layers."""
        return self.num_layers - self.num_external_layers


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Sizes of the heads; which of them a model has, its task or its checkpoint decides."""

    mlm_tied: bool = False
    """True decodes masked words with the text tower's word embeddings; published models have a matrix of their own."""
    itc_width: int = 256
    """Channels of the contrastive embeddings."""
    itc_initial_temperature: float = 0.07
    """Learned from there, within [0.001, 0.5]."""
    num_answers: int = 3129
    """Classes of the VQA head."""
    classifier_scale: float = 2.0
    """Hidden channels of the VQA and SNLI-VE heads, as a multiple of the pooled pair's; 1 for training from scratch."""
    nlvr2_scale: float = 1.5
    """Hidden channels of the NLVR2 head, as a multiple of the pooled pair's; METER has 1."""

    def __post_init__(self) -> None:
        check_positive(
            model__heads__itc_width=self.itc_width,
            model__heads__num_answers=self.num_answers,
            model__heads__classifier_scale=self.classifier_scale,
            model__heads__nlvr2_scale=self.nlvr2_scale,
        )
        if not 0.001 <= self.itc_initial_temperature <= 0.5:
            raise ConfigError(
                f"model.heads.itc_initial_temperature={self.itc_initial_temperature} is not in [0.001, 0.5]; "
                "the paper has 0.07."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """BridgeTower: two towers, bridges and a cross-modal encoder."""

    image_size_px: int = 288
    """Side of the square image the model reads."""
    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)

    def __post_init__(self) -> None:
        patch = self.vision.patch_size_px
        if patch and (self.image_size_px < patch or self.image_size_px % patch):
            lower = max(1, self.image_size_px // patch) * patch
            raise ConfigError(
                f"model.image_size_px={self.image_size_px} is not a multiple of model.vision.patch_size_px={patch}. "
                f"Use {lower} or {lower + patch}."
            )
        fusion, towers = self.fusion, (("vision", self.vision), ("text", self.text))
        # The shallower one decides, so that the number that the error names fits both.
        depths = [(tower.num_layers, name) for name, tower in towers if tower.num_layers]
        if depths and fusion.num_bridged > min(depths)[0]:
            depth, name = min(depths)
            raise ConfigError(
                f"model.fusion.num_layers={fusion.num_layers} with {fusion.num_external_layers} external bridges "
                f"{fusion.num_bridged} layers, more than the {name} tower has ({depth}). Use "
                f"--model.fusion.num_layers={depth + fusion.num_external_layers} or fewer, or more of them external."
            )
        for name, tower in towers:
            if not fusion.num_layers and tower.width not in (0, fusion.width):
                raise ConfigError(
                    f"model.fusion.num_layers=0 pools the towers' own states, so that model.{name}.width="
                    f"{tower.width} must be model.fusion.width={fusion.width}. Make them equal, or use 1 or more "
                    "layers."
                )
        if self.heads.mlm_tied and self.text.width not in (0, fusion.width):
            raise ConfigError(
                f"model.heads.mlm_tied=True decodes states of model.fusion.width={fusion.width} with word embeddings "
                f"of model.text.width={self.text.width}. Make them equal, or set it to false."
            )
