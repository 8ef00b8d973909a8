"""Collective operations, in one process and on two real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bridgetower import dist
from tests.ranks import run_on_ranks

ROWS = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2)  # two ranks with three rows each


def on_each_rank(rank: int, folder: Path) -> None:
    rows = ROWS[rank].clone().requires_grad_()
    gathered = dist.gather_rows(rows)
    # Each rank weights every row differently: 1, 2, ... on the first rank, ten times that on the second.
    (gathered * weights_of(rank)).sum().backward()
    results = {
        "rank": (dist.rank(), dist.world_size()),
        "rows": gathered.detach(),
        "gradient": rows.grad,
        "large integers": dist.gather_rows(torch.tensor([[2**62 + rank]])),
        "sum": dist.sum_over_ranks(torch.tensor([1.0, 10.0 * rank])),
        "claims": [dist.any_rank(rank == 1, torch.device("cpu")), dist.any_rank(False, torch.device("cpu"))],
        "objects": dist.gather_objects({"from": rank}),
        "first": dist.from_first_rank(f"from rank {rank}"),
    }
    torch.save(results, folder / f"{rank}.pt")


def weights_of(rank: int) -> torch.Tensor:
    return torch.arange(1.0, 13.0, dtype=torch.float64).reshape(6, 2) * (10 if rank else 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Return what each rank computed."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(on_each_rank, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_each_process_knows_its_rank_and_the_world_size(results):
    assert [one["rank"] for one in results] == [(0, 2), (1, 2)]


def test_gathered_rows_are_in_rank_order(results):
    assert all(torch.equal(one["rows"], ROWS.flatten(0, 1)) for one in results)


def test_gradient_of_a_row_is_the_sum_over_the_ranks_that_used_it(results):
    total = weights_of(0) + weights_of(1)
    assert torch.equal(results[0]["gradient"], total[:3]) and torch.equal(results[1]["gradient"], total[3:])


def test_large_integers_are_gathered_exactly(results):
    assert results[0]["large integers"].tolist() == [[2**62], [2**62 + 1]]


def test_sums_claims_and_objects_are_the_same_on_every_rank(results):
    for one in results:
        assert one["sum"].tolist() == [2.0, 10.0]
        assert one["claims"] == [True, False]
        assert one["objects"] == [{"from": 0}, {"from": 1}]
        assert one["first"] == "from rank 0"


def test_a_single_process_needs_no_other_rank():
    rows = torch.ones(2, 3, requires_grad=True)
    assert dist.gather_rows(rows) is rows
    assert (dist.rank(), dist.world_size()) == (0, 1)
    assert dist.gather_objects("x") == ["x"] and dist.from_first_rank("x") == "x"
    assert dist.any_rank(True, rows.device) and not dist.any_rank(False, rows.device)


def test_sum_is_a_new_tensor_and_leaves_its_argument_unchanged():
    values = torch.ones(2)
    dist.sum_over_ranks(values).add_(1)
    assert values.tolist() == [1, 1]
