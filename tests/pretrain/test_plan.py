"""pretrain/plan.py: states as DeepSpeed lays them out, parameters, the best choice, its time, and wrong flags."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower.config.deepspeed import merge_deepspeed_config
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.devices import DEVICES
from bridgetower.engine.optim import group_parameters
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.init import shapes_alone
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask
from pretrain import plan
from pretrain.plan_memory import count_parameters, count_states, read_splitting
from pretrain.plan_time import Cluster, Planner
from pretrain.presets import base_4m, tiny
from tests.conftest import REPO, run_script
from tests.ranks import run_on_ranks

BUCKET = 500_000


def memory(stage: int, *, bf16: bool) -> dict[str, Any]:
    """The content of a file of ds_configs/."""
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": BUCKET}
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
    return {"zero_optimization": zero, **precision}


def living(before: set[int], module: torch.nn.Module) -> int:
    """Bytes of all memory that tensors hold, except what was there before."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in before)


def _measure(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    import deepspeed

    from benchmarks import step_sides
    from bridgetower.engine.initialize import build_engine

    deepspeed.init_distributed("gloo", dist_init_required=False)
    run = dataclasses.replace(tiny(), objectives=dataclasses.replace(tiny().objectives, itc=False))
    batch = step_sides.make_batch(complete_model_config(run.model), 4, torch.device("cpu"))
    measured = {}
    for stage, bf16 in ((2, True), (2, False), (1, True)):
        gc.collect()
        before = {
            thing.untyped_storage().data_ptr() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)
        }
        task = PretrainTask(BridgeTower(run.model, run.objectives.heads), run.objectives)
        config = merge_deepspeed_config(
            memory(stage, bf16=bf16), micro_batch_size=4, accumulation_steps=2, max_grad_norm=0.0
        )
        engine = build_engine(task, run.optim, config, torch.device("cpu"))
        sizes = []
        for _ in range(4):
            loss, _ = engine(batch)
            engine.backward(loss)
            del loss
            sizes.append(living(before, task))
            engine.step()
        engine.zero_grad()
        sizes.append(living(before, task))
        measured[f"{stage} {bf16}"] = sizes
        del engine, task
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))


def test_states_are_those_that_deepspeed_holds_on_two_ranks(tmp_path):
    run_on_ranks(_measure, 2, tmp_path)
    measured = json.loads((tmp_path / "measured.json").read_text())
    run = dataclasses.replace(tiny(), objectives=dataclasses.replace(tiny().objectives, itc=False))
    run = dataclasses.replace(run, model=complete_model_config(run.model))
    parameters = count_parameters(run)
    # Scalars and tables take a few kB more.
    for stage, bf16 in ((2, True), (2, False)):
        states = count_states(stage, parameters, read_splitting(memory(stage, bf16=bf16)), 2)
        *_, at_boundary, after = measured[f"{stage} {bf16}"]
        lasting = states.weights + states.master_weights + states.optimizer
        assert after == pytest.approx(lasting, abs=20_000)
        # In fp32 tensors on the boundary of the two partitions are whole on both.
        assert at_boundary - after == pytest.approx(states.gradients, rel=0.001 if bf16 else 0.08)
    states = count_states(1, parameters, read_splitting(memory(1, bf16=True)), 2)
    at_boundary = measured["1 True"][3]
    lasting = states.weights + states.master_weights + states.optimizer
    assert at_boundary - lasting == pytest.approx(states.gradients, rel=0.02)


@pytest.mark.parametrize("frozen", [(0, 0), (2, 0), (0, 2), (-1, -1), (4, 3)])
@pytest.mark.parametrize(
    "objectives",
    [
        ObjectivesConfig(),
        ObjectivesConfig(itc=True),
        ObjectivesConfig(itm=False),
        ObjectivesConfig(itm=False, itc=True),
        ObjectivesConfig(mlm=False),
    ],
    ids=lambda objectives: "+".join(objectives.heads),
)
@pytest.mark.parametrize("layers", [2, 0])
def test_parameters_are_those_that_training_gives_the_optimizer(frozen, objectives, layers):
    optim = dataclasses.replace(tiny().optim, frozen_vision_layers=frozen[0], frozen_text_layers=frozen[1])
    model = complete_model_config(tiny().model)
    model = dataclasses.replace(model, fusion=dataclasses.replace(model.fusion, num_layers=layers))
    run = dataclasses.replace(tiny(), model=model, objectives=objectives, optim=optim)
    with shapes_alone():
        trained = BridgeTower(model, objectives.heads)
    freeze_layers(trained, vision=frozen[0], text=frozen[1])
    task = PretrainTask(trained, objectives)
    groups = [sum(p.numel() for p in group["params"]) for group in group_parameters(task, optim)]
    counted = count_parameters(run)
    assert list(counted.groups) == groups
    assert counted.frozen == sum(p.numel() for p in task.parameters() if not p.requires_grad)


def planner(name: str = "zero2_bf16") -> Planner:
    run = dataclasses.replace(base_4m(), model=complete_model_config(base_4m().model))
    content = json.loads((REPO / f"ds_configs/{name}.json").read_text())
    return Planner(run, count_parameters(run), read_splitting(content), 12.0)


def cluster(gpu: str = "a100-80g", num_gpus: int = 64, nics: int = 8, mfu: float = 0.5) -> Cluster:
    return Cluster(
        gpu=gpu,
        device=DEVICES[gpu],
        num_gpus=num_gpus,
        gpus_per_node=min(8, num_gpus),
        nic_gbps=200.0,
        nics_per_node=nics,
        mfu=mfu,
    )


@pytest.fixture(scope="module")
def base() -> Planner:
    return planner()


def test_base_on_64_a100_takes_what_its_operations_say(base):
    best = base.best(cluster(), base.micro_batches(64))
    assert best is not None and (best.micro_batch, best.recompute) == (64, ())
    timing = base.time(cluster(), best)
    # 382 GFLOP per pair, 64 pairs, half of 312 TFLOP/s.
    assert timing.compute == pytest.approx(382e9 * 64 / 156e12, rel=0.01)
    # 365 M weights of two bytes, 63/64 of them sent twice by an all-reduce over 8 x 25 GB/s per node, then gathered.
    assert timing.reduce_bytes == pytest.approx(2 * 0.719e9, rel=0.005)
    assert timing.reduce == pytest.approx(7.2e-3, rel=0.01) and timing.gather == pytest.approx(3.6e-3, rel=0.01)
    assert timing.step * 100_000 / 3600 == pytest.approx(4.49, abs=0.05)


def test_one_nic_per_node_is_eight_times_slower_and_accumulation_reduces_again(base):
    best = base.best(cluster(), base.micro_batches(64))
    halved = best._replace(micro_batch=32)
    one, eight = base.time(cluster(nics=1), best), base.time(cluster(), best)
    assert one.reduce == pytest.approx(8 * eight.reduce) and one.gather == pytest.approx(28.8e-3, rel=0.01)
    assert base.time(cluster(), halved).reduce_bytes == pytest.approx(2 * eight.reduce_bytes)
    assert base.time(cluster(), halved._replace(stage=1)).reduce_bytes == pytest.approx(eight.reduce_bytes)


def test_one_gpu_sends_nothing(base):
    alone = cluster(num_gpus=1)
    timing = base.time(alone, base.best(alone, base.micro_batches(1)))
    assert timing.reduce_bytes == timing.gather_bytes == timing.reduce_exposed == timing.gather == 0.0


def test_every_stage_micro_batch_and_set_of_parts_is_a_choice_and_recomputing_more_needs_less(base):
    choices = {(c.stage, c.micro_batch, c.recompute): c for c in base.choices(cluster(), [32, 64])}
    assert len(choices) == 4 * 2 * 8
    for stage in range(4):
        assert choices[stage, 32, ()].total < choices[stage, 64, ()].total
        assert choices[stage, 64, ("vision", "text", "fusion")].total < choices[stage, 64, ("fusion",)].total
    assert [c.states.total for c in (choices[s, 32, ()] for s in range(4))] == sorted(
        (choices[s, 32, ()].states.total for s in range(4)), reverse=True
    )
    assert not choices[0, 32, ()].offered and not choices[3, 32, ()].offered and choices[1, 32, ()].offered


def test_best_choice_recomputes_only_where_it_must(base):
    small = dataclasses.replace(cluster(), device=DEVICES["a100-80g"]._replace(memory_gb=9.0))
    best = base.best(small, [64])
    assert best is not None and best.recompute and best.total <= 9e9
    assert base.best(cluster(), [64]).recompute == ()


def test_plan_of_tiny_is_printed_and_written(tmp_path):
    path = tmp_path / "plan.json"
    flags = ["tiny", "--gpus=2", "--gpu=l40s"]
    shown = run_script("pretrain/plan.py", *flags, "--price_per_gpu_hour=1.5").stdout
    assert "2 x l40s" in shown and "25% of 362 TFLOP/s" in shown and "cost" in shown
    assert max(map(len, shown.splitlines())) <= 120
    run_script("pretrain/plan.py", *flags, f"--json={path}")
    content = json.loads(path.read_text())
    assert [row["gpus"] for row in content["scaling"]] == [2**n for n in range(11)]
    best = content["best"]
    states = content["states_gb"]["2"]
    parts = sum(v for k, v in states.items() if k != "not_offered") + sum(best["parts_gb"].values())
    assert parts == pytest.approx(best["total_gb"])
    assert best["flags"][0] == f"--data.micro_batch_size={best['micro_batch']}"
    assert best["seconds"]["step"] == pytest.approx(
        sum(best["seconds"][name] for name in ("compute", "gradients_waited_for", "weights_gathered", "optimizer"))
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"gpu": "v100"}, "Unknown GPU v100. Did you mean h100?"),
        ({"gpuss": "3"}, "Unknown flag --gpuss. Did you mean --gpus?"),
        ({"optim.base_lrr": "1"}, "Did you mean --optim.base_lr?"),
        ({"gpus": "96"}, "--gpus=96 does not divide data.global_batch_size=4096"),
        ({"gpus": "256"}, "--data.negative_group_size=16"),
        ({"gpus": "64", "nodes": "7"}, "Use --gpus=70"),
        ({"gpus": "0"}, "--gpus=0 must be 1 or more"),
        ({"mfu": "40"}, "--mfu=40 is not a number from 0 to 1"),
        ({"mfu": "nan"}, "--mfu=nan is not a number from 0 to 1"),
        ({"nic_gbps": "0"}, "connects no nodes"),
        ({"text_tokens": "90"}, "from 3 to 50"),
        ({"json": "/no/such/folder/plan.json"}, "there is no folder"),
        ({"engine.deepspeed": "zero9"}, "offers: zero2_bf16"),
        ({"model.vision.name": "ViT-B-16-SigLIP"}, "no cost formula for the layers of the vision tower"),
        ({"optim.frozen_vision_layers": "13"}, "the vision tower has 12 layers"),
        ({"optim.frozen_text_layers": "-2"}, "optim.frozen_text_layers=-2"),
        ({"gpu": "a100-40g", "gpus": "1", "model.image_size_px": "1920"}, "fits on no --gpu=a100-40g"),
    ],
)
def test_wrong_flags_are_refused_with_a_suggestion(flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan.main("base_4m", **flags)


def test_what_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"still needs [\d.]+ GB.*What would fit:.*(negative_group_size|GPUs)"):
        plan.main("base_4m", gpu="a100-40g", gpus="1", **{"model.image_size_px": "1920"})


def test_wrong_usage_has_its_exit_code():
    refused = run_script("pretrain/plan.py", "base_4m", "--gpu=v100", code=2)
    assert refused.stderr.startswith("error: Unknown GPU v100")
