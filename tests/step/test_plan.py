"""The plan of a packed step leaves padding out, and steps with compiled operations or frozen layers agree with it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.config.run import ObjectivesConfig
from bridgetower.errors import ConfigError
from bridgetower.kernels.compiled_ops import CompiledOps
from bridgetower.kernels.cpu_ops import CpuOps
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.step.plan import fit_bucket, plan_step
from bridgetower.tasks.pretraining import PretrainTask
from tests.model.test_plain import BATCHES, fast_step
from tests.small_models import random_batch, small_config, small_task


def test_nothing_is_computed_for_padding():
    batch = random_batch(7)
    plan = plan_step(batch, ObjectivesConfig())
    assert len(plan.ids_T) == 2 * sum(batch.num_tokens) < 2 * batch.clean_ids_BL.numel()
    assert (plan.ids_T != 1).all()
    lengths = torch.tensor(batch.num_tokens)[plan.order_B]
    assert lengths.tolist() == sorted(batch.num_tokens)
    texts = plan.ids_T[: sum(batch.num_tokens)].split(lengths.tolist())
    for pair, text in zip(plan.order_B.tolist(), texts, strict=True):
        assert text.tolist() == batch.clean_ids_BL[pair, : batch.num_tokens[pair]].tolist()


def test_only_class_tokens_and_masked_tokens_are_read_from_the_last_layer():
    batch = random_batch(7)
    plan = plan_step(batch, ObjectivesConfig())
    read_ids = plan.ids_T[plan.fusion.tokens][plan.fusion.read.token_Q]
    assert read_ids[:7].tolist() == batch.clean_ids_BL[plan.order_B, 0].tolist()
    assert len(read_ids) == 7 + sum(batch.num_masked) and (read_ids[7:] == 4).all()
    assert plan.fusion.read.image_rows == slice(0, 7) and len(plan.fusion.image_R) == 14
    assert plan.mlm_label_M.sort().values.tolist() == batch.mlm_label_M.sort().values.tolist()


def test_a_bucket_pads_every_size_and_says_which_slots_are_padding():
    batch = random_batch(7)
    bucket = fit_bucket(batch)
    plan = plan_step(batch, ObjectivesConfig(), bucket=bucket)
    assert len(plan.ids_T) == 2 * bucket.tokens > 2 * sum(batch.num_tokens)
    assert len(plan.mlm_label_M) == bucket.masked > sum(batch.num_masked)
    assert (plan.mlm_pair_M == 7).sum() == bucket.masked - sum(batch.num_masked)
    assert plan.layout.spans is not None and not plan.layout.spans.covers


# Inductor takes a minute to build its kernels; benchmarks/step.py runs those.
def test_compiled_operations_agree_and_are_compiled_once_for_captions_of_any_length():
    eager = small_task(ObjectivesConfig())
    ops = CompiledOps(CpuOps(has_matrix_units=False), backend="aot_eager")
    compiled = PretrainTask(BridgeTower(small_config(), ("mlm", "itm"), ops=ops), ObjectivesConfig())
    compiled.load_state_dict(eager.state_dict(), strict=True)
    for name in ("7 pairs", "captions without a masked token"):
        losses, gradients = fast_step(eager, BATCHES[name])
        compiled_losses, compiled_gradients = fast_step(compiled.train(), BATCHES[name])
        assert compiled_losses == pytest.approx(losses, abs=1e-5)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(compiled_gradients[parameter], gradient, rtol=1e-3, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):  # batches with other lengths and numbers of masked tokens
            fast_step(compiled, random_batch(7, seed=100 + seed))


def step_flops(task: PretrainTask) -> int:
    with FlopCounterMode(display=False) as counter:
        task(BATCHES["7 pairs"])[0].backward()
    return int(counter.get_total_flops())


def test_frozen_layers_are_not_trained_and_cost_no_backward_pass():
    task = small_task(ObjectivesConfig())
    flops = [step_flops(task)]
    for vision, text in ((2, 1), (4, 3), (-1, -1)):
        freeze_layers(task.model, vision=vision, text=text)
        task.zero_grad(set_to_none=True)
        flops.append(step_flops(task))
        frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
        assert all(parameter.grad is None for parameter in task.parameters() if not parameter.requires_grad)
        assert any("conv1" in name for name in frozen) and any("word_embeddings" in name for name in frozen)
        assert any("resblocks.1." in name for name in frozen) and any("layer.0." in name for name in frozen)
        assert any("ln_post" in name for name in frozen) == (vision == -1)
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4
    assert all("tower" in name for name in frozen)


def test_freezing_more_layers_than_a_tower_has_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.frozen_text_layers=9, but the text tower has \d layers.*-1 for"):
        freeze_layers(small_task().model, vision=0, text=9)
