"""benchmarks/gpu/measure.py with small shapes on the CPU: every path that a GPU would take is run once."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import time
from unittest import mock

import pytest
import torch
from PIL import Image

from benchmarks.gpu import measure
from benchmarks.gpu.agreement import gradient_difference
from benchmarks.gpu.pipeline import synthetic_photos, training_settings
from benchmarks.gpu.plan import EVERYTHING, Request, Run, Section, plan, read_request, seconds_for
from benchmarks.gpu.sections import MEASURES
from benchmarks.gpu.timing import or_out_of_memory
from bridgetower.config.named_models import MODELS
from bridgetower.config.overrides import apply_overrides
from bridgetower.data.order import cut_global_batch
from bridgetower.errors import EXIT_FAILED, ConfigError
from pretrain.presets import PRESETS
from tests.conftest import run_script, script_environment

SCRIPT = "benchmarks/gpu/measure.py"
NAMES = [section.name for section in plan(small=True)]
FULL = [section.name for section in plan(small=False)]


@pytest.fixture(autouse=True)
def restore_environment():
    """Undo what ``start_server`` sets in the environment for the processes that it starts."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what one call prints, and the content of its file.

    It runs in this process, so that the fork server of all tests' sections imports its libraries once.
    """
    out = tmp_path_factory.mktemp("gpu") / "results/gpu.json"
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ, script_environment({})), contextlib.redirect_stdout(io.StringIO()) as printed:
        measure.main(out=str(out), small="true", device="cpu")
    signal.signal(signal.SIGTERM, handler)
    return printed.getvalue(), json.loads(out.read_text())


def list_rows(content, *names):
    return [row for name in names for row in content["sections"][name]["rows"]]


def test_every_section_gives_figures_without_an_error(measured):
    printed, content = measured
    assert list(content["sections"]) == NAMES and content["setting"]["small"]
    for name, result in content["sections"].items():
        assert result["error"] == "" and result["rows"] and result["seconds"] > 0, name
        assert name in printed
        assert not any("error" in row for row in result["rows"])
    assert 0 < content["seconds"] < 60 * content["setting"]["minutes"]


def test_steps_have_a_rate_their_operations_and_their_kept_memory(measured):
    names = [name for name in NAMES if name.startswith(("steps", "compiled", "engine", "sides"))]
    rows = list_rows(measured[1], *names)
    sides = {row["what"].split(",")[0] for row in rows}
    assert sides == {"eager", "recorded", "compiled", "ours", "plain", "transformers", "ZeRO-2"}
    for row in rows:
        assert row["pairs_per_second"] == pytest.approx(row["micro_batch"] / row["step_ms"] * 1e3)
        assert len(row["step_ms_of_rounds"]) == 3 and row["gflop_per_pair"] > 0 and math.isfinite(row["loss"])
        assert row["mfu"] is None and row["peak_gb"] is None  # no GPU
        assert row["what"] not in ("eager", "recorded") or row["kept_mb_per_pair"] > 0


def test_the_step_of_the_engine_is_profiled(measured):
    (row,) = list_rows(measured[1], "engine_base")
    total, *kernels = row["profile"]
    assert total["kernel"] == "all work" and len(kernels) == 40
    assert [kernel["ms"] for kernel in kernels] == sorted((kernel["ms"] for kernel in kernels), reverse=True)
    assert 0.5 * total["ms"] < sum(kernel["ms"] for kernel in kernels) < total["ms"]
    assert any("mm" in kernel["kernel"] for kernel in kernels)


def test_sides_do_different_amounts_of_work_for_one_loss(measured):
    ours, recorded, plain, transformers = list_rows(measured[1], "sides")
    assert recorded["gflop_per_pair"] == ours["gflop_per_pair"]
    assert ours["gflop_per_pair"] < 0.6 * plain["gflop_per_pair"]
    assert transformers["gflop_per_pair"] == pytest.approx(plain["gflop_per_pair"], rel=0.05)


def test_recomputing_keeps_less_memory_and_is_not_counted_as_work(measured):
    none, everything, fusion = (row for row in list_rows(measured[1], "steps_base") if row["micro_batch"] == 4)
    assert everything["kept_mb_per_pair"] < fusion["kept_mb_per_pair"] < none["kept_mb_per_pair"]
    for row in (everything, fusion):
        assert row["gflop_per_pair"] == none["gflop_per_pair"] < row["gflop_per_pair_with_recomputing"]


def test_our_step_agrees_with_the_plain_model_in_both_precisions(measured):
    rows = list_rows(measured[1], "agreement", "agreement_compiled")
    assert all(row["agrees"] for row in rows)
    assert {row["what"].partition(", ")[2] for row in rows} >= {"float32", "bfloat16", "compiled, bfloat16"}
    (exact,) = (row for row in rows if row["what"] == "ours, float32")
    assert exact["gradient_difference"] < 1e-5


def test_a_training_run_reports_how_long_it_waits_for_data(measured):
    (row,) = list_rows(measured[1], "pipeline")
    assert row["pairs_per_second"] > 0 and 0 <= row["wait_fraction"] < 1 and row["workers"] >= 1
    assert len(row["pairs_per_second_of_reports"]) == 4 and row["photographs"].startswith("16 of 640x480")
    assert row["accumulation_steps"] * row["micro_batch"] == 8 and row["what"].endswith(", 8 pairs per step")


def test_results_name_the_machine_and_the_versions_of_libraries(measured):
    (machine,) = list_rows(measured[1], "machine")
    assert machine["torch"] == torch.__version__ and machine["cores"] >= 1 and "commit" in machine
    assert {"deepspeed", "transformers", "timm", "open_clip_torch"} <= machine["versions"].keys()
    assert "not installed" not in machine["versions"].values()


def test_a_failed_section_is_recorded_the_others_still_run_and_the_exit_code_is_1(tmp_path, capsys):
    file, setting = tmp_path / "gpu.json", {"minutes": 8, "small": True, "device": "cpu"}
    broken = Section("broken", 5.0, "steps", lambda _: {"model": "huge", "runs": (Run(2),)})
    machine = next(section for section in plan(small=True) if section.name == "machine")
    results = measure.run_sections([broken, machine], setting, time.monotonic(), file)
    assert results == json.loads(file.read_text())["sections"]
    assert results["broken"]["rows"] == [] and results["broken"]["error"] == "KeyError: 'huge'"
    assert "Traceback" in results["broken"]["log"]
    assert results["machine"]["rows"] and not results["machine"]["error"]
    with pytest.raises(SystemExit) as stopped:
        measure._finish(results)
    assert stopped.value.code == EXIT_FAILED and "KeyError: 'huge'" in capsys.readouterr().out


def test_a_section_that_takes_too_long_is_killed_with_its_reason(tmp_path):
    request = Request("steps", "cpu", True, 0.5, "small", (Run(2),))
    result = measure.run_section(multiprocessing.get_context("forkserver"), request, tmp_path / "section")
    assert result["rows"] == [] and result["error"].startswith("killed after 0 s, its time limit")
    assert multiprocessing.active_children() == []


def test_the_engine_uses_torchs_adamw_where_fusedadam_cannot_be_built(tmp_path):
    request_file, result_file = tmp_path / "request.json", tmp_path / "result.json"
    Request("engine", "cpu", True, 60.0, "small", (Run(2),), optimizer="fused").write(request_file)
    # A compiler that always fails.
    env = {"CXX": "/bin/false", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    run_script("benchmarks/gpu/sections.py", str(request_file), str(result_file), env=env, launcher="preloaded")
    result = json.loads(result_file.read_text())
    (row,) = result["rows"]
    assert result["error"] == "" and row["optimizer"] == "torch" and row["pairs_per_second"] > 0
    assert row["note"].startswith("torch's AdamW, as FusedAdam cannot be built")


def test_a_step_that_runs_out_of_memory_is_a_row_and_no_error_of_its_section():
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    assert or_out_of_memory(step) == {"error": "does not fit: CUDA out of memory. Tried to allocate 2.00 GiB."}


def test_a_wrong_or_missing_gradient_is_reported():
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert gradient_difference(expected, dict(expected)) == (0.0, "a")
    difference, where = gradient_difference(expected, {**expected, "b": torch.tensor([3.0])})
    assert difference == pytest.approx(0.2) and where == "b"
    assert gradient_difference(expected, {"a": expected["a"]}) == (math.inf, "b")


def make_rows(*rates, what="recorded", **more):
    """Make a section's result from pairs of a micro-batch size and its pairs per second."""
    return {"rows": [{"what": what, "micro_batch": n, "pairs_per_second": rate, **more} for n, rate in rates]}


RESULTS = {
    "nothing": {},
    "failed": {name: {"rows": [{"micro_batch": 16, "error": "does not fit"}]} for name in FULL},
    "compiled is faster": {
        "steps_base": {
            "rows": [
                *make_rows((32, 990.0), what="eager")["rows"],
                *make_rows((32, 800.0), (64, 900.0), (128, 890.0))["rows"],
                *make_rows((256, 950.0), what="eager, recomputes fusion")["rows"],
            ]
        },
        "steps_large": make_rows((8, 200.0), (16, 250.0)),
        "compiled_base": make_rows((64, 1200.0), what="compiled"),
        "engine_base": make_rows((64, 850.0), optimizer="torch"),
    },
}


@pytest.mark.parametrize("results", RESULTS.values(), ids=RESULTS)
def test_the_full_plan_requests_only_what_exists_whatever_was_measured_before(results, tmp_path):
    for section in plan(small=False):
        request = Request(section.measure, "cuda", False, 60.0, **section.options(results))
        request.write(tmp_path / "request.json")
        assert read_request(tmp_path / "request.json") == request
        assert request.measure in MEASURES and request.model in MODELS
        assert request.runs or section.name == "machine"
        assert {run.recompute for run in request.runs} <= {(), EVERYTHING, ("fusion",)}
        for run in request.runs if request.measure == "pipeline" else ():
            settings = training_settings(request, run, tmp_path, workers=14)
            data = apply_overrides(PRESETS[request.preset](), settings).data
            cut_global_batch(data.global_batch_size, data.micro_batch_size, 1, data.negative_group_size)


def test_the_plan_takes_the_fastest_micro_batches_and_the_optimizer_that_could_be_built():
    options = {section.name: section.options(RESULTS["compiled is faster"]) for section in plan(small=False)}
    assert options["compiled_base"]["runs"] == (Run(32, compiled=True),)
    assert options["engine_base"]["runs"] == (Run(64, compiled=True),)
    assert options["engine_large"]["runs"] == (Run(16),) and options["engine_large"]["optimizer"] == "torch"
    assert options["pipeline"]["runs"] == (Run(64, compiled=True, accumulation_steps=64),)
    assert options["pipeline_large"]["runs"] == (Run(16),) and options["pipeline_large"]["preset"] == "large_4m"


def test_a_training_run_has_the_published_global_batch_whatever_micro_batch_is_fastest():
    results = {"steps_base": make_rows((64, 850.0), (192, 960.0), (256, 950.0), model="base")}
    options = {section.name: section.options(results) for section in plan(small=False)}
    assert options["engine_base"]["runs"] == (Run(192),)
    assert options["pipeline"]["runs"] == (Run(256, accumulation_steps=16),)


def test_rates_of_training_runs_are_printed_beside_their_targets(capsys):
    measured = {
        "steps_base": make_rows((64, 900.0), (32, 800.0), model="base"),
        "compiled_base": make_rows((64, 1200.0), model="base", what="compiled"),
        "pipeline": make_rows((64, 870.0), (128, 910.0), model="base_4m", what="train.py, eager"),
        "pipeline_large": make_rows((8, 7.0), model="tiny", what="train.py, eager"),
    }
    measure._print({name: {**section, "error": ""} for name, section in measured.items()})
    printed = capsys.readouterr().out
    assert "base, the step alone: 1,200 pairs/s, compiled; minimum 850 from JPEGs on an H100, target 1,210" in printed
    assert "base, from JPEGs: 910 pairs/s, train.py, eager; minimum 850" in printed
    assert "large, from" not in printed  # small shapes


def test_sections_fit_into_eight_minutes_and_spare_time_goes_to_those_that_take_longer():
    sections = plan(small=False)
    assert sum(section.seconds for section in sections) <= 470
    left = 480.0
    for index, section in enumerate(sections):  # each takes as long as planned
        given = seconds_for(section, sections[index:], left)
        assert section.seconds <= given <= min(left, 3 * section.seconds)
        left -= section.seconds
    assert seconds_for(sections[0], sections, sections[0].seconds - 1) == 0.0


def test_a_section_without_enough_time_left_is_skipped_with_a_line_and_recorded(tmp_path, capsys):
    setting, file = {"minutes": 8, "small": True, "device": "cpu"}, tmp_path / "gpu.json"
    results = measure.run_sections([Section("long", 500.0, "machine", lambda _: {})], setting, time.monotonic(), file)
    skipped = "skipped: it takes about 500 s, and 480 s of --minutes=8 are left"
    assert f"long {skipped}" in capsys.readouterr().out
    assert (
        results == json.loads(file.read_text())["sections"] == {"long": {"seconds": 0.0, "error": skipped, "rows": []}}
    )


def test_small_shapes_take_every_path_of_the_full_plan():
    assert [name for name in FULL if not name.endswith("_large")] == NAMES
    assert {section.measure for section in plan(small=True)} == {section.measure for section in plan(small=False)}
    large = {name.removesuffix("_large") for name in FULL if name.endswith("_large")}
    assert large == {"steps", "compiled", "engine", "pipeline"}  # kinds of measurement that base has too


def test_every_kind_of_measurement_is_planned_and_the_most_important_comes_first():
    options = {section.name: section.options({}) for section in plan(small=False)}
    runs = {name: option.get("runs", ()) for name, option in options.items()}
    for size in ("base", "large"):
        eager = [run for run in runs[f"steps_{size}"] if not run.recompute]
        assert len({run.micro_batch for run in eager}) >= 2
        assert {run.recompute for run in runs[f"steps_{size}"]} == {(), EVERYTHING, ("fusion",)}
        assert runs[f"compiled_{size}"][0].compiled and runs[f"engine_{size}"]
    assert options["pipeline"]["preset"] == "base_4m" and options["pipeline_large"]["preset"] == "large_4m"
    names = list(options)
    assert names[:4] == ["machine", "agreement", "steps_base", "steps_large"] and names[-1] == "agreement_compiled"


def test_synthetic_photographs_have_the_file_size_of_real_ones():
    first, second = synthetic_photos((640, 480), 2)
    assert first != second and synthetic_photos((640, 480), 1) == [first]
    for raw in (first, second):
        assert Image.open(io.BytesIO(raw)).size == (640, 480)
        # A photograph of JPEG quality 90 has 1 to 4 bits per pixel.
        assert 640 * 480 / 8 < len(raw) < 640 * 480 / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": ""}, "--out is missing"),
        ({"device": "cpu"}, "A GPU is needed, and --device=cpu excludes it.*--small --device=cpu"),
        ({"device": "tpu"}, "--device=tpu is not known. Use auto, cuda or cpu"),
        ({"minutes": "0"}, "--minutes=0 must be 1 or more"),
        ({"small": "maybe"}, "--small=maybe is neither true nor false"),
        ({"small": "true", "sections": "steps_bse"}, "--sections: Unknown section steps_bse. Did you mean steps_base"),
        ({"minute": "3"}, "Unknown flag --minute. Did you mean --minutes"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(flags, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        measure.main(**{"out": str(tmp_path / "gpu.json"), **flags})
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_machine_without_a_gpu_the_error_says_what_to_do(tmp_path):
    result = run_script(SCRIPT, f"--out={tmp_path / 'gpu.json'}", code=2)
    assert "torch" in result.stderr and "sees none" in result.stderr and "--small" in result.stderr
