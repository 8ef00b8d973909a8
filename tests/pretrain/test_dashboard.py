"""``pretrain/dashboard.py`` sends W&B a workspace that shows every metric of docs/metrics.md, and nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bridgetower.config.overrides import walk_fields
from bridgetower.errors import ConfigError
from bridgetower.evaluation.table import LABELS
from pretrain import dashboard
from pretrain.paper_scores import PAPER_SCORES
from pretrain.presets import PRESETS
from tests.conftest import REPO, free_port, run_script
from tests.pretrain.wandb_server import KEY, serving

SCRIPT = "pretrain/dashboard.py"
FLAGS = ("--entity=team", "--project=bridgetower")
SECTIONS = [
    *("Training health", "By corpus", "Speed", "Data", "Memory and pauses", "Held-out scores"),
    *("Comparison of runs", "Paper targets"),
]
# Possible values of the parts of a metric's name that differ between runs.
PLACEHOLDERS = {
    "OBJECTIVE": ["mlm", "itm", "itc"],
    "CORPUS": ["cc3m", "coco-train"],
    "GROUP": ["tower_decay", "heads"],
    "SPLIT": ["combination", "test"],
    "SCORE": list(LABELS),
}


def documented() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (REPO / "docs/metrics.md").read_text(), flags=re.MULTILINE)


def examples(name: str) -> set[str]:
    """Return names as a run writes them, for a name as docs/metrics.md writes it."""
    for placeholder, values in PLACEHOLDERS.items():
        if placeholder in name:
            return {example for value in values for example in examples(name.replace(placeholder, value))}
    return {name}


@pytest.fixture(scope="module")
def sent() -> dict[str, Any]:
    """Return the variables of the mutation that the script sends."""
    with serving() as server:
        run_script(SCRIPT, *FLAGS, env=server.env)
        (variables,) = server.mutations
    return variables


@pytest.fixture(scope="module")
def sections(sent) -> dict[str, list[dict[str, Any]]]:
    """Return the panels of each section."""
    bank = json.loads(sent["spec"])["section"]["panelBankConfig"]
    return {section["name"]: section["panels"] for section in bank["sections"]}


def metrics_of(panel: dict[str, Any]) -> Iterator[str]:
    """Yield what a panel reads: metrics, regular expressions (beginning with ^), and settings (config:NAME)."""
    config = panel["config"]
    yield from config.get("metrics", [])
    yield from (config[key] for key in ("metricRegex", "targetKey") if key in config)
    axes = [config[key] for key in ("xAxis", "yAxis") if config.get(key, "_step") != "_step"]
    columns = [column["accessor"] for column in config.get("columns", [])]
    yield from (name.removeprefix("summary:") for name in [*axes, *columns])


def all_metrics(sections) -> set[str]:
    return {name for panels in sections.values() for panel in panels for name in metrics_of(panel)}


def without_ids(spec: Any) -> Any:
    """Return a specification without the panels' ids, which are random."""
    if isinstance(spec, dict):
        return {key: without_ids(value) for key, value in spec.items() if key != "__id__"}
    return [without_ids(item) for item in spec] if isinstance(spec, list) else spec


def test_the_workspace_is_sent_to_the_given_project_with_the_sections_in_order(sent, sections):
    assert {key: sent[key] for key in ("entityName", "projectName", "displayName", "type")} == {
        "entityName": "team",
        "projectName": "bridgetower",
        "displayName": "BridgeTower pretraining",
        "type": "project-view",
    }
    assert "id" not in sent
    assert list(sections) == SECTIONS and all(sections.values())


def test_every_panel_reads_what_is_documented_and_everything_documented_is_shown(sections):
    known = {example for name in documented() for example in examples(name)}
    shown: set[str] = set()
    for name in all_metrics(sections):
        if name.startswith("config:"):
            continue
        matches = {example for example in known if re.search(name, example)} if name.startswith("^") else {name} & known
        assert matches, f"no metric of docs/metrics.md is {name}"
        shown |= matches
    assert known - shown == set()


def test_a_pattern_matches_one_documented_metric_only(sections):
    for name in all_metrics(sections):
        if name.startswith("^"):
            assert name.endswith("$") and ".*" not in name
            matches = [metric for metric in documented() if any(re.search(name, each) for each in examples(metric))]
            assert len(matches) == 1, f"{name} matches {matches}"


def test_compared_settings_are_settings_of_a_run(sections):
    settings = {name for name, *_ in walk_fields(PRESETS["base_4m"]())}
    compared = [name for name in all_metrics(sections) if name.startswith("config:")]
    # W&B stores a nested setting below the value of its section.
    assert len(compared) == 4
    assert {re.sub(r"^config:([^.]+)\.value\.", r"\1.", name) for name in compared} <= settings


def test_columns_of_the_run_table_are_documented(sent):
    (runs,) = json.loads(sent["spec"])["section"]["runSets"]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[0] == "run:displayName" and len(columns) > 3
    assert {column.removeprefix("summary:") for column in columns[1:]} <= set(documented())


def test_runs_are_compared_in_more_than_one_way(sections):
    kinds = [panel["viewType"] for panel in sections["Comparison of runs"]]
    assert kinds == [
        *("Run Comparer", "Run History Line Plot", "Parallel Coordinates Plot", "Parameter Importance"),
        *("Bar Chart", "Scatter Plot"),
    ]
    assert sections["Comparison of runs"][1]["config"]["xAxis"] == "progress/pairs"


def test_paper_targets_are_shown_beside_the_scores_of_the_runs(sections):
    table, pairs, *recalls = sections["Paper targets"]
    text = table["config"]["value"]
    for score in PAPER_SCORES:
        assert f"| {score.task} | {score.model} | {score.percent:.2f}% | {score.source} |" in text
    assert "100,000 steps of 4,096 pairs (409.6 million)" in text and "1e-05 for the towers, 5e-05" in text
    assert (pairs["config"]["metrics"], pairs["config"]["yAxisMax"]) == (["progress/pairs"], 409_600_000)
    assert [panel["config"]["metricRegex"] for panel in recalls] == ["^eval/[^/]+/t2i_r1$", "^eval/[^/]+/i2t_r1$"]


def test_dry_run_prints_what_would_be_sent_without_key_and_network(sent, tmp_path):
    env = {"HOME": str(tmp_path), "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": ""}
    printed = json.loads(run_script(SCRIPT, *FLAGS, "--dry-run", env=env).stdout)
    expected = {**sent, "spec": json.loads(sent["spec"])}
    assert without_ids(printed) == without_ids({key: expected[key] for key in printed})
    assert set(expected) - set(printed) <= {"description", "locked"}


def test_running_the_command_again_updates_the_workspace_and_keeps_its_filters():
    with serving() as server:
        first = run_script(SCRIPT, *FLAGS, env=server.env).stdout
        (view,) = server.views.values()
        spec = json.loads(view["spec"])
        spec["section"]["runSets"][0]["search"]["query"] = "base_4m"
        bank = spec["section"]["panelBankConfig"]
        removed = bank["sections"].pop()
        view["spec"] = json.dumps(spec)
        again = run_script(SCRIPT, *FLAGS, env=server.env).stdout
        other = run_script(SCRIPT, *FLAGS, "--name=Mine", env=server.env).stdout
    assert re.fullmatch(rf"{server.url}/team/bridgetower\?nw=[0-9a-f]{{11}}\n", first)
    assert first == again != other
    assert [mutation.get("id") for mutation in server.mutations] == [None, "view0", None]
    updated = json.loads(server.mutations[1]["spec"])["section"]
    assert updated["runSets"][0]["search"]["query"] == "base_4m"
    assert without_ids(updated["panelBankConfig"]["sections"][-1]) == without_ids(removed)
    assert server.mutations[2]["displayName"] == "Mine"


def test_a_refusal_by_wandb_is_an_error_that_says_why():
    with serving(may_write=False) as server:
        refused = run_script(SCRIPT, *FLAGS, env=server.env, code=2)
        absent = run_script(SCRIPT, "--entity=team", "--project=other", env=server.env, code=2)
        server.views.update({name: {"id": "x", "displayName": "x", "spec": '{"version": 99}'} for name in view_names()})
        newer = run_script(SCRIPT, *FLAGS, env=server.env, code=2)
    assert f"error: {server.url} refuses: input: permission denied. The key must belong" in refused.stderr
    assert "may write to team/bridgetower" in refused.stderr
    assert "has no project team/other that this key may see" in absent.stderr
    assert "--tracker.wandb_project=other" in absent.stderr
    assert "in a format that the installed wandb-workspaces does not know" in newer.stderr
    assert server.mutations == [] and "Traceback" not in refused.stderr + absent.stderr + newer.stderr


def view_names() -> list[str]:
    return [dashboard._build("team", "bridgetower", "BridgeTower pretraining")._internal_name]


def test_a_server_that_does_not_answer_is_an_error():
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "2"}
    result = run_script(SCRIPT, *FLAGS, env=env, code=2)
    assert re.search(r"error: http://127\.0\.0\.1:\d+ does not answer .*login node", result.stderr)
    assert "Traceback" not in result.stderr


def test_no_key_is_an_error_before_anything_is_sent(tmp_path):
    with serving() as server:
        result = run_script(
            SCRIPT, *FLAGS, env={"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": ""}, code=2
        )
    assert f"There is no W&B key for {server.url}. Run `wandb login`" in result.stderr
    assert server.authorizations == set()


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "pretrain.dashboard_panels", raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # its import fails as if it were not there
    with pytest.raises(ConfigError, match=r"wandb-workspaces is not installed.*pip install -e \.\[dashboard\]"):
        dashboard.main(entity="team", project="bridgetower", dry_run="true")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--entity is missing. Usage"),
        ({"entity": "team"}, "--project is missing. Usage"),
        ({"entity": "team", "project": "p", "name": " "}, "--name is missing"),
        ({"entity": "team/p", "project": "p"}, "--entity=team/p is not the name of a team or user"),
        ({"entity": "team", "project": "team/p"}, "--project=team/p is not the name of a project"),
        ({"entity": "team", "project": "p" * 129}, "is not the name of a project, which has at most 128 characters"),
        ({"entity": "team", "project": "p", "name": "loss + speed"}, "contains emoji or a sign like"),
        ({"entity": "team", "project": "p", "dry_run": "maybe"}, "--dry_run=maybe is neither true nor false"),
        ({"entity": "team", "projekt": "p"}, "Unknown flag --projekt. Did you mean --project?"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ConfigError) as raised:
        dashboard.main(**{"dry_run": "true", **flags})
    assert message in str(raised.value)
