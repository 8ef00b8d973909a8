"""Settings of the model: towers, cross-modal encoder and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bridgetower.config.checks import check_fraction, check_positive
from bridgetower.errors import ConfigError

CUSTOM = "custom"
"""Name of a tower that is defined by its sizes instead of an existing model."""


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        fitting = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads in (32, 48, 64, 96)]
        raise ConfigError(
            f"{name}.width={width} is not a multiple of {name}.num_heads={num_heads}. "
            f"Heads of 32 to 96 channels need num_heads={' or '.join(map(str, fitting[::-1])) or 1}."
        )


def _check_sizes(section: str, name: str, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError unless every size is positive, or 0 for the size of a named tower's model."""
    for field_name, value in sizes.items():
        if value < 0 or (value == 0 and name == CUSTOM):
            raise ConfigError(
                f"{section}.{field_name}={value} must be greater than 0. A tower with {section}.name={CUSTOM} "
                f"needs {', '.join(sizes)}; for an existing model give its name."
            )


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Vision tower: any ViT of open_clip, or a custom one."""

    name: str = "ViT-B-16-quickgelu"
    """Name of an open_clip model, whose image tower is used; or custom, a CLIP ViT of the sizes below."""
    weights: str = "none"
    """Initial weights: none (random); openai or another tag that open_clip lists for the name (needs the hub or its
    cache); or a weights file of that model."""
    num_layers: int = 0
    """Number of transformer blocks; 0 for all of the named tower. A smaller number drops its last blocks (the original
    METER has 11)."""
    patch_size_px: int = 0
    """Side of a patch in pixels; must divide model.image_size_px. 0 for the named tower's."""
    width: int = 0
    """Number of channels of the states; 0 for the named tower's."""
    num_heads: int = 0
    """Number of attention heads; 0 for the named tower's."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Activation of a custom tower: quick_gelu as in OpenAI's CLIP, or gelu as in most of open_clip's own models. A
    named tower ignores it."""

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("patch_size_px", "width", "num_layers", "num_heads")}
        _check_sizes("model.vision", self.name, sizes)
        if self.width and self.num_heads:
            _check_heads("model.vision", self.width, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Text tower: any RoBERTa-like encoder of transformers, or a custom one."""

    name: str = "roberta-base"
    """Name on the Hugging Face hub, or folder with a config.json, of a RoBERTa, XLM-R, DistilRoBERTa, CamemBERT or
    BERT; or custom, a RoBERTa of the sizes below."""
    tokenizer: str = "roberta"
    """Tokenizer: roberta (RoBERTa's exact vocabulary, shipped), emoji (the demo's, shipped), or a folder with
    tokenizer.json, or with vocab.json and merges.txt."""
    weights: str = "none"
    """Initial weights: none (random), or the name or folder of a transformers model, e.g. roberta-base."""
    max_tokens: int = 50
    """Maximum number of tokens per text, <s> and </s> included; longer texts are cut off at the end."""
    num_layers: int = 0
    """Number of transformer layers; 0 for all of the named tower. A smaller number drops its last layers."""
    vocabulary_size: int = 0
    """Number of token ids; 0 for the named tower's."""
    width: int = 0
    """Number of channels of the states; 0 for the named tower's."""
    num_heads: int = 0
    """Number of attention heads; 0 for the named tower's."""
    num_positions: int = 0
    """Number of rows of the position table; 0 for the named tower's. A RoBERTa's first token has row 2, so it reads at
    most num_positions - 2 tokens."""
    dropout: float = 0.1
    """Dropout probability for hidden states and attention probabilities."""

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
"""Forms of the bridge: rows (a) to (i) of the paper's Table 1, in its order."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Cross-modal encoder and bridges."""

    width: int = 768
    """Number of channels of the cross-modal states."""
    num_layers: int = 6
    """Number of cross-modal layers per modality. 0 pools the towers' own class tokens (Table 2 of the paper)."""
    num_external_layers: int = 0
    """Number of last cross-modal layers that have no bridge and read no tower layer (Table 3). All layers external is
    METER."""
    num_heads: int = 12
    """Number of attention heads."""
    dropout: float = 0.1
    """Dropout probability for attention probabilities, attention outputs and feed-forward outputs."""
    layer_norm_eps: float = 1e-12
    """Epsilon of the layer norms in the cross-modal layers and the MLM head: 1e-12 as published, 1e-5 in Hugging Face's
    port."""
    bridge: BridgeForm = "add"
    """Form of the bridge between a tower layer and a cross-modal layer, as in Table 1: (a) add, the published model;
    (b) product; (c) interpolate; (d) gated_interpolate; (e) linear_concat; (f) mlp_concat; (g) cross_attention;
    (h) cross_attention_ffn; (i) linear_residual."""
    bridge_masks_padding: bool = True
    """True: cross_attention and cross_attention_ffn ignore padding. False: they attend to it, as the authors' code
    does; a step then also computes padding, up to the longest caption of the micro-batch."""
    multi_layer_fusion: bool = False
    """True: the cross-modal encoder reads a gated sum of all layers of each tower instead of the last layer, as METER
    does. Needs all layers external."""

    def __post_init__(self) -> None:
        check_positive(model__fusion__width=self.width, model__fusion__layer_norm_eps=self.layer_norm_eps)
        _check_heads("model.fusion", self.width, self.num_heads)
        check_fraction("model.fusion.dropout", self.dropout)
        if self.num_layers < 0:
            raise ConfigError(f"model.fusion.num_layers={self.num_layers} must be 0 or more; the paper uses 6.")
        if not 0 <= self.num_external_layers <= self.num_layers:
            raise ConfigError(
                f"model.fusion.num_external_layers={self.num_external_layers} must be from 0 to "
                f"model.fusion.num_layers={self.num_layers}, as it counts the last layers."
            )
        if self.multi_layer_fusion and (self.num_bridged or not self.num_layers):
            raise ConfigError(
                "model.fusion.multi_layer_fusion=True feeds one state per tower to the cross-modal layers, but "
                f"{self.num_bridged} of model.fusion.num_layers={self.num_layers} have bridges to different layers. "
                f"Use --model.fusion.num_external_layers={self.num_layers or 6} with as many layers, or switch it off."
            )

    @property
    def sees_padding(self) -> bool:
        """True if padding changes the states of real tokens, so that a step must compute it."""
        has_attention = self.bridge in ("cross_attention", "cross_attention_ffn")
        return has_attention and self.num_bridged > 1 and not self.bridge_masks_padding

    @property
    def num_bridged(self) -> int:
        """Number of cross-modal layers with a bridge, which is the number of bridged layers of each tower."""
        return self.num_layers - self.num_external_layers


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Sizes of the heads. The task or the checkpoint decides which heads a model has."""

    mlm_tied: bool = False
    """True: MLM's decoder shares the text tower's word embeddings. False: it has its own matrix, as in published
    models."""
    itc_width: int = 256
    """Number of channels of the contrastive embeddings."""
    itc_initial_temperature: float = 0.07
    """Initial value of ITC's learned temperature, which is clamped to [0.001, 0.5]."""
    num_answers: int = 3129
    """Number of classes of the VQA head."""
    classifier_scale: float = 2.0
    """Hidden width of the VQA and SNLI-VE heads as a multiple of the pooled pair's (2 x fusion.width); 1 for training
    from scratch."""
    nlvr2_scale: float = 1.5
    """Hidden width of the NLVR2 head as a multiple of the pooled pair's (2 x fusion.width); METER uses 1."""

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
                "the paper uses 0.07."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """BridgeTower: two towers, bridges and a cross-modal encoder."""

    image_size_px: int = 288
    """Side of the square image that the model reads, in pixels."""
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
        # The shallower tower decides, so that the number that the error suggests fits both.
        depths = [(tower.num_layers, name) for name, tower in towers if tower.num_layers]
        if depths and fusion.num_bridged > min(depths)[0]:
            depth, name = min(depths)
            raise ConfigError(
                f"model.fusion.num_layers={fusion.num_layers} with {fusion.num_external_layers} external bridges "
                f"{fusion.num_bridged} layers, more than the {name} tower has ({depth}). Use "
                f"--model.fusion.num_layers={depth + fusion.num_external_layers} or fewer, or more external layers."
            )
        for name, tower in towers:
            if not fusion.num_layers and tower.width not in (0, fusion.width):
                raise ConfigError(
                    f"model.fusion.num_layers=0 pools the towers' own states, so model.{name}.width="
                    f"{tower.width} must equal model.fusion.width={fusion.width}. Make them equal, or use 1 or more "
                    "layers."
                )
        if self.heads.mlm_tied and self.text.width not in (0, fusion.width):
            raise ConfigError(
                f"model.heads.mlm_tied=True decodes states of model.fusion.width={fusion.width} with word embeddings "
                f"of model.text.width={self.text.width}. Make them equal, or set it to false."
            )
