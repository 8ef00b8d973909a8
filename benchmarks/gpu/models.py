"""The models of benchmarks/gpu, built as ``pretrain/train.py`` builds them."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import step_sides
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.compiled_ops import CompiledOps
from bridgetower.kernels.torch_ops import TorchOps
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask


def find_config(name: str) -> ModelConfig:
    """Return a model's settings by name.

    ``small`` is tiny with dropout, and with two layers and heads of 64 channels, which transformers can hold.
    """
    if name != "small":
        return complete_model_config(MODELS[name]())
    tiny = MODELS["tiny"]()
    return complete_model_config(
        dataclasses.replace(
            tiny,
            vision=dataclasses.replace(tiny.vision, num_layers=2, num_heads=tiny.vision.width // 64),
            text=dataclasses.replace(tiny.text, num_layers=2, dropout=0.1),
            fusion=dataclasses.replace(tiny.fusion, dropout=0.1),
        )
    )


def build_task(
    config: ModelConfig,
    compute: ComputeConfig,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dropout: float | None = None,
) -> PretrainTask:
    """Build our task with random weights and in training mode.

    Args:
        dropout: None keeps the model's own.
    """
    ops = None
    if compute.compile and device.type == "cpu":
        # Small shapes on a CPU try the path alone: the code is traced, and not generated, which takes a minute.
        attention = choose_ops(device)
        assert isinstance(attention, TorchOps)
        ops = CompiledOps(attention, backend="eager")
    return step_sides.build_our_task(config, compute, device, dtype, dropout=dropout, ops=ops)


def change_graphs(task: PretrainTask, *, cuda_graphs: bool) -> PretrainTask:
    """Return a task with the same model, with CUDA graphs or launched kernel by kernel.

    A CUDA graph hides operations and memory from whoever counts them.
    """
    return PretrainTask(task.model, task.objectives, ComputeConfig(cuda_graphs=cuda_graphs)).train(task.training)
