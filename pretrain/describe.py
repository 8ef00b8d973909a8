"""Print the parameters, shapes and operations per pair of a model: ``python pretrain/describe.py base``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import (
    narrow_overrides,
    parse_bool,
    parse_whole,
    refuse_unknown,
    run_command,
    show_usage_or_stop,
)
from bridgetower.config.named_models import MODELS
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError
from pretrain.presets import PRESETS

USAGE = """Usage: python pretrain/describe.py MODEL [--model.section.field=value ...] [--text_tokens=N] [--tensors=true]

MODEL is a model preset, a run preset, or anything that can be loaded: a run or checkpoint folder, a safetensors export,
a Hugging Face folder, a .ckpt of the published code. --text_tokens is the length of the caption that operations are
counted for, with its <s> and </s> (default: 13, the mean of CC3M). --tensors=true lists every tensor."""


def main(model: str = "", *unexpected: str, text_tokens: str = "13", tensors: str = "false", **overrides: str) -> None:
    """Print the tables of ``model``."""
    if not model:
        show_usage_or_stop("model", overrides, USAGE)
    length, lists_tensors = parse_whole("text_tokens", text_tokens, 3), parse_bool("tensors", tensors)
    if model in PRESETS or model in MODELS:
        run = PRESETS[model]() if model in PRESETS else replace(PRESETS["base_4m"](), name=model, model=MODELS[model]())
        run = narrow_overrides(run, ("model.",), unexpected, overrides, USAGE)
        config, heads = run.model, run.objectives.heads
    else:
        refuse_unknown(unexpected, overrides, ("text_tokens", "tensors"), USAGE)
        if "/" not in model and not Path(model).exists():
            raise ConfigError(unknown_name("model", model, [*PRESETS, *MODELS]))
        from bridgetower.interop.open import load_model

        loaded = load_model(model)
        config, heads = loaded.config, tuple(loaded.heads)
    # Imports torch, which takes seconds, so it stands behind the checks that do not need it.
    from pretrain.model_tables import print_model

    print_model(model, config, heads, text_tokens=length, lists_tensors=lists_tensors)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
