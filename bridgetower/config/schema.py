"""Every setting of a run: typed, frozen, documented, and refusing nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bridgetower.errors import ConfigError


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}={value} is not in [0, 1): it is a share, so 10 % is written 0.1.")


def _check_positive(**values: int | float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name.replace('__', '.')}={value} must be greater than 0.")


def _check_heads(name: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        fitting = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads in (32, 48, 64, 96)]
        raise ConfigError(
            f"{name}.width={width} does not divide into {name}.num_heads={num_heads}. "
            f"Heads of 32 to 96 channels: num_heads={' or '.join(map(str, fitting[::-1])) or 1}."
        )


CUSTOM = "custom"
"""Name of a tower that is given by its sizes, not by a model that exists."""


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
        _check_fraction("model.text.dropout", self.dropout)
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
        _check_positive(model__fusion__width=self.width, model__fusion__layer_norm_eps=self.layer_norm_eps)
        _check_heads("model.fusion", self.width, self.num_heads)
        _check_fraction("model.fusion.dropout", self.dropout)
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
        _check_positive(
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


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """The pretraining losses; those switched on are summed with weight 1, as published."""

    mlm: bool = True
    """Masked language modelling on the true image."""
    itm: bool = True
    """Image-text matching: half of the captions are shown with another pair's image."""
    itc: bool = False
    """Image-text contrast of the towers' class tokens over all ranks' micro-batches."""
    mlm_probability: float = 0.15
    """Share of tokens to predict."""

    def __post_init__(self) -> None:
        if not (self.mlm or self.itm):
            raise ConfigError(
                "objectives.mlm and objectives.itm are both off, so nothing trains the cross-modal layers. "
                "Switch at least one on; for contrast alone train the towers with open_clip."
            )
        if not 0.0 < self.mlm_probability < 1.0:
            raise ConfigError(
                f"objectives.mlm_probability={self.mlm_probability} is not in (0, 1); the paper has 0.15."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """The model's heads that the active objectives need."""
        return tuple(name for name in ("mlm", "itm", "itc") if getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What is read, and how it is cut into batches, whatever is trained."""

    train_shards: tuple[str, ...]
    """Corpus folders (each with a shards.json), comma-separated on the command line."""
    eval_shards: tuple[str, ...] = ()
    """Held-out corpus folders; the first one gives the headline scores."""
    global_batch_size: int = 4096
    """Pairs of one optimiser step, over all ranks and micro-steps."""
    micro_batch_size: int = 32
    """Pairs on one rank in one forward pass."""
    corpus_weights: tuple[float, ...] = ()
    """How often each pair of a corpus is seen in an epoch, by corpus of train_shards; empty: once, as published."""
    shards_per_window: int = 64
    """Pairs are shuffled within windows of this many shards."""
    workers: int = 8
    """Processes per rank that prepare batches; 0 prepares them in the training process."""
    prefetch_batches: int = 4
    """Micro-batches each worker keeps ready."""
    exact_resize: bool = False
    """True decodes large JPEGs in full before they are scaled, as the published code does, instead of at a half or less
    where that leaves at least twice the side."""
    on_bad_sample: Literal["fail", "replace"] = "fail"
    """What happens to a pair that cannot be read: the run stops, or another pair of its corpus, which is a function of
    the position, takes its place, is counted and named in the log. Evaluation always stops."""
    max_bad_fraction: float = 0.001
    """With on_bad_sample=replace the run stops when more pairs than this share were replaced (of at least 10,000)."""
    cache_dir: str = ""
    """Folder on a local disk for shards of s3://, gs:// or http(s):// folders, shared by the ranks of a node."""
    cache_gb: float = 100.0
    """Most that cache_dir holds, in 10^9 bytes; at least three windows of shards."""

    def __post_init__(self) -> None:
        if not self.train_shards:
            raise ConfigError("data.train_shards is empty. Give at least one corpus folder: --data.train_shards=DIR.")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must be 0 or more.")
        _check_positive(
            data__global_batch_size=self.global_batch_size,
            data__micro_batch_size=self.micro_batch_size,
            data__shards_per_window=self.shards_per_window,
            data__prefetch_batches=self.prefetch_batches,
            data__cache_gb=self.cache_gb,
        )
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction} must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    """What is read, and how it is cut into batches."""

    negative_group_size: int = 32
    """ITM negatives are drawn within this many consecutive pairs, whatever the number of ranks."""
    itm_negatives: Literal["group", "corpus"] = "group"
    """Where ITM negatives come from: group costs no further image; corpus reads another image of the same corpus for
    each, as the published code does."""
    record_pairs: bool = False
    """Write what each rank was given to runs/NAME/pairs/, in the form of pretrain/trace.py."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and its schedule."""

    base_lr: float
    """Peak learning rate of both towers."""
    total_steps: int
    """Optimiser steps, not micro-steps. Fine-tuning: 0 takes as many as `epochs` come to."""
    warmup_fraction: float = 0.1
    """Share of total_steps spent rising linearly from zero; then it falls linearly to zero."""
    fusion_lr_scale: float = 5.0
    """The rate of transforms, bridges, cross-modal layers and poolers is base_lr times this."""
    head_lr_scale: float = 5.0
    """The rate of the heads (MLM, ITM, ITC, VQA, SNLI-VE, NLVR2) is base_lr times this."""
    weight_decay: float = 0.01
    """Decoupled; on matrices and embeddings, not on biases, norms and other vectors."""
    decay_like_reference: bool = False
    """True also decays the vision tower's norms and class embedding, the temperature and the norms of the VQA, SNLI-VE
    and NLVR2 heads, as the published code does."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.98
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    max_grad_norm: float = 0.0
    """Gradients of a larger global norm are scaled down to it; 0 never clips, as published."""
    frozen_vision_layers: int = 0
    """Lowest blocks of the vision tower that are not trained, with what comes before them; -1 the whole tower. They
    cost no backward pass."""
    frozen_text_layers: int = 0
    """The same of the text tower."""
    implementation: Literal["auto", "fused", "torch"] = "auto"
    """fused = DeepSpeed's FusedAdam, torch = torch's AdamW; auto is fused on CUDA and torch on the CPU."""

    def __post_init__(self) -> None:
        _check_positive(
            optim__base_lr=self.base_lr,
            optim__fusion_lr_scale=self.fusion_lr_scale,
            optim__head_lr_scale=self.head_lr_scale,
            optim__eps=self.eps,
        )
        _check_fraction("optim.beta1", self.beta1)
        _check_fraction("optim.beta2", self.beta2)
        if self.total_steps < 0:
            raise ConfigError(f"optim.total_steps={self.total_steps} must be greater than 0.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            example = f"for {min(1000, self.total_steps // 10)} steps write "
            example += f"{min(1000, self.total_steps // 10) / max(1, self.total_steps):g}"
            raise ConfigError(
                f"optim.warmup_fraction={self.warmup_fraction} is not in [0, 1). It is a share of "
                f"optim.total_steps={self.total_steps}; {example if self.total_steps else '10 % is written 0.1'}."
            )
        if self.max_grad_norm < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"optim.max_grad_norm={self.max_grad_norm} and optim.weight_decay={self.weight_decay} "
                "must be 0 (off) or more."
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed runs it."""

    deepspeed: str = "auto"
    """A file of ds_configs/ without .json, or a path; auto is zero2_bf16 where the device computes in bfloat16 by
    itself (GPUs, CPUs with avx512_bf16 or AMX), otherwise zero2_fp32."""
    threads_per_rank: int = 0
    """CPU threads of each rank's computation; 0 shares the cores among the ranks of the node."""

    def __post_init__(self) -> None:
        if self.threads_per_rank < 0:
            raise ConfigError(f"engine.threads_per_rank={self.threads_per_rank} must be 0 (share the cores) or more.")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How much of the step's work is saved. Losses and gradients are those of the plain step, with all of it off."""

    share_images: bool = True
    """The vision tower runs once per image of a micro-batch; off: once for MLM and once for ITM, as published."""
    pack_text: bool = True
    """Nothing is computed for padding; off: captions are padded to the longest of the micro-batch."""
    masked_logits_only: bool = True
    """MLM's logits are computed at masked tokens only; off: at all."""
    prune_last_layer: bool = True
    """Of the last cross-modal layer only what a loss reads is computed."""
    share_first_layer: bool = True
    """Images enter the first cross-modal layer once, not once for MLM and once for ITM."""
    absorb_projections: bool = True
    """Texts attend to images without projecting these to keys and values, where captions are short."""
    joint_pass: bool = True
    """MLM and ITM go through the cross-modal encoder together; off: one after the other."""
    fuse_kernels: bool = True
    """On a GPU, sums, dropout and norms in one kernel, activations with their biases in one, attention of texts, and of
    images in the vision tower, by kernels of this project; off: torch's operators."""
    cuda_graphs: bool = True
    """The step is recorded as CUDA graphs, once for each shape, and asked for at once; off: kernel by kernel. On a GPU,
    in half precision, with MLM and ITM alone, captions of 64 tokens at most, and nothing recomputed or compiled."""
    recompute: tuple[str, ...] = ()
    """Parts whose layers are computed again in the backward pass instead of kept: some of vision, text, fusion."""
    compile: bool = False
    """torch.compile of what the layers are made of; the first step then takes minutes."""

    def __post_init__(self) -> None:
        for part in self.recompute:
            if part not in ("vision", "text", "fusion"):
                raise ConfigError(f"compute.recompute={part} is no part of the model. Use some of vision,text,fusion.")


PLAIN = ComputeConfig(
    share_images=False,
    pack_text=False,
    masked_logits_only=False,
    prune_last_layer=False,
    share_first_layer=False,
    absorb_projections=False,
    joint_pass=False,
    fuse_kernels=False,
    cuda_graphs=False,
)
"""The step without any of it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores on held-out data."""

    every_steps: int = 0
    """Evaluate during training every so many steps; 0 only at its end."""
    batch_size: int = 64
    """Images, captions or pairs of one forward pass."""
    max_images: int = 1000
    """Of each split, its first images with all their captions; 0 takes all."""
    max_images_without_itc: int = 100
    """Without ITC, retrieval asks ITM for every pair of so many images and their captions."""
    rerank_top_k: int = 16
    """Candidates per query that the cross-modal encoder scores again, with ITC on."""
    rerank_score: Literal["itm_and_itc", "itm", "itm_logit"] = "itm_and_itc"
    """itm ranks them by ITM's log odds of a match, itm_logit by its logit of a match alone, as published; itm_and_itc
    adds ITC's logit to the log odds, as pretraining's ITM has only seen random negatives and ITC tells close ones
    apart."""
    num_samples: int = 24
    """Pictures kept in predictions.json for the report, for each split."""

    def __post_init__(self) -> None:
        _check_positive(evaluation__batch_size=self.batch_size, evaluation__rerank_top_k=self.rerank_top_k)
        if self.max_images_without_itc < 2:
            raise ConfigError(
                f"evaluation.max_images_without_itc={self.max_images_without_itc} must be 2 or more, to choose from."
            )
        if self.max_images == 1:
            raise ConfigError("evaluation.max_images=1 leaves nothing to choose from. Use 0 (all) or 2 or more.")
        if min(self.every_steps, self.max_images, self.num_samples) < 0:
            raise ConfigError(
                f"evaluation.every_steps={self.every_steps}, evaluation.max_images={self.max_images} and "
                f"evaluation.num_samples={self.num_samples} must be 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved."""

    every_steps: int = 1000
    """Steps between checkpoints; the last step and each that is followed by an evaluation are saved, too."""
    keep_last: int = 3
    """Older ones are deleted; 0 keeps all."""

    def __post_init__(self) -> None:
        _check_positive(checkpoint__every_steps=self.every_steps)
        if self.keep_last < 0:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be 0 (keep all) or more.")


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics go, beside metrics.jsonl."""

    every_steps: int = 50
    """Steps between two lines of metrics."""
    wandb: Literal["off", "auto", "online", "offline"] = "auto"
    """auto does what WANDB_MODE says, else is online where a key is set, else offline (files in the run folder, for
    `wandb sync`)."""
    wandb_project: str = "bridgetower"
    """Project of the dashboard."""
    wandb_entity: str = ""
    """Team of the dashboard; empty is the account's own."""

    def __post_init__(self) -> None:
        _check_positive(tracker__every_steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pretraining run, whole."""

    name: str
    """Folder of the run below run_root."""
    run_root: str = "runs"
    """Folder that holds the runs."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint if there is one, never refuses a folder that has one,
    PATH starts from that run folder or checkpoint."""
    seed: int = 0
    """Of everything random: order, masks, negatives, initial weights and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        check_run(self.name, self.seed)
        _check_positive(optim__total_steps=self.optim.total_steps)


def check_run(name: str, seed: int) -> None:
    """Check what every kind of run has.

    Raises:
        ConfigError: the name cannot be a folder's, or the seed is negative.
    """
    if not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"name={name!r} must be a folder name without '/'. The folder above is run_root.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be 0 or more.")
