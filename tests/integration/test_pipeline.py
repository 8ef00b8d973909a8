"""From shards to a report, with the commands that a user gives."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, command_line, free_port, run_script, script_environment
from tests.integration.runs import metrics, settings, train

EVALUATED = ["--evaluation.every_steps=4", "--evaluation.num_samples=6"]


@pytest.fixture(scope="module")
def root(emoji_shards, tmp_path_factory) -> Path:
    """Train the run "whole": two ranks, evaluated during training, with W&B without a key."""
    folder = tmp_path_factory.mktemp("runs")
    splits = f"--data.eval_shards={emoji_shards / 'combination'},{emoji_shards / 'concept'}"
    words = [*EVALUATED, splits, "--tracker.wandb=auto"]
    output = train(folder, emoji_shards, "whole", 6, *words, ranks=2, launcher="deepspeed")
    (folder / "output").write_text(output.stdout + output.stderr)
    run_script("pretrain/report.py", str(folder / "whole"))
    return folder


def read_scores(root):
    return json.loads((root / "whole/eval.json").read_text())


def test_run_folder_holds_what_the_design_names(root):
    names = {path.name for path in (root / "whole").iterdir()}
    assert {"run.json", "deepspeed.json", "metrics.jsonl", "eval.json", "checkpoints", "report.html"} <= names


def test_first_lines_of_the_log_say_what_computes_the_run(root):
    log = (root / "output").read_text()
    assert re.search(r"whole: \d+\.\d M parameters, 2 ranks on (cpu|cuda), zero2_(bf16|fp32)", log)


def test_every_held_out_score_has_its_chance_level(root):
    content = read_scores(root)
    assert content["headline_split"] == "combination" and content["step"] == 6
    names = {"itm_balanced_accuracy", "mlm_loss", "mlm_accuracy"}
    names |= {f"{prefix}{way}_r{k}" for prefix in ("", "itc_") for way in ("t2i", "i2t") for k in (1, 5, 10)}
    for split in ("combination", "concept"):
        results = content["splits"][split]
        assert set(results["scores"]) == set(results["chance"]) == names
        assert all(math.isfinite(value) for value in results["scores"].values())
    assert {name: content[name] for name in names} == content["splits"]["combination"]["scores"]
    # One caption for each of 330 images.
    assert content["splits"]["combination"]["chance"]["t2i_r1"] == pytest.approx(1 / 330)


def test_scores_during_training_are_in_the_metrics(root):
    lines = {line["step"]: line for line in metrics(root, "whole", ["eval/"]) if len(line) > 1}
    assert sorted(lines) == [4, 6]
    for name, value in read_scores(root)["splits"]["concept"]["scores"].items():
        assert lines[6][f"eval/concept/{name}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("ranks", [0, 2])
def test_evaluating_again_gives_the_same_scores_at_any_number_of_ranks(root, ranks):
    before = read_scores(root)
    (root / "whole/eval.json").unlink()
    output = run_script("pretrain/evaluate_run.py", str(root / "whole"), ranks=ranks)
    assert read_scores(root) == before
    assert "ITM balanced accuracy" in output.stdout and "concept" in output.stdout


def test_settings_of_the_evaluation_can_be_overridden(root):
    saved = (root / "whole/eval.json").read_bytes()
    run_script("pretrain/evaluate_run.py", str(root / "whole"), "--evaluation.max_images=50")
    assert read_scores(root)["splits"]["combination"]["chance"]["t2i_r1"] == pytest.approx(1 / 50)
    (root / "whole/eval.json").write_bytes(saved)


def test_without_itc_retrieval_scores_every_pair_of_a_smaller_gallery(root, emoji_shards):
    words = ["--objectives.itc=false", "--evaluation.max_images_without_itc=12", "--evaluation.num_samples=2"]
    train(root, emoji_shards, "plain", 2, *words, f"--data.eval_shards={emoji_shards / 'combination'}")
    content = json.loads((root / "plain/eval.json").read_text())["splits"]["combination"]
    names = {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert names <= set(content["scores"]) and not any(name.startswith("itc_") for name in content["scores"])
    assert content["chance"]["t2i_r1"] == content["chance"]["i2t_r1"] == pytest.approx(1 / 12)


def test_wandb_without_a_key_writes_an_offline_run(root):
    assert list((root / "whole/wandb").glob("offline-run-*"))


def test_run_json_repeats_the_run_under_torchrun(root):
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"],
        *[str(REPO / "pretrain/train.py"), str(root / "whole/run.json"), "--name=again", "--tracker.wandb=off"],
    ]
    subprocess.run(command, cwd=REPO, env=script_environment({}), check=True, capture_output=True, timeout=300)
    prefixes = ["train/", "optim/", "eval/"]
    assert metrics(root, "again", prefixes) == metrics(root, "whole", prefixes)


def test_finished_run_is_only_evaluated_again(root, emoji_shards):
    splits = f"--data.eval_shards={emoji_shards / 'combination'},{emoji_shards / 'concept'}"
    before = metrics(root, "whole"), read_scores(root)
    output = train(root, emoji_shards, "whole", 6, *EVALUATED, splits, ranks=2)
    assert "is complete" in output.stderr
    assert [line for line in metrics(root, "whole") if len(line) > 1] == [line for line in before[0] if len(line) > 1]
    assert read_scores(root) == before[1]


def test_report_loads_no_other_file(root):
    page = (root / "whole/report.html").read_text()
    loaded = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    allowed = ("data:", "#", "https://creativecommons.org")
    assert [address for address in loaded if not address.startswith(allowed)] == []
    assert "ITM balanced accuracy" in page and page.count("<svg") >= 5
    # Captions of held-out images, and the attribution that CC-BY requires.
    assert "skin tone" in page and "Twitter, Inc." in page


# Writes into the title how many images the browser could not draw, and whether the page must be scrolled sideways. The
# load event waits for the images that the probe adds.
PROBE = """<script>
  const shown = [...document.querySelectorAll('.image')].map(e => getComputedStyle(e).backgroundImage.slice(5, -2));
  const layers = [...document.images].map(image => image.src);
  const images = [...shown, ...layers].map(address => {
    const image = document.createElement('img');
    image.src = address;
    image.style.display = 'none';
    return document.body.appendChild(image);
  });
  addEventListener('load', () => {
    const broken = images.filter(image => !image.complete || !image.naturalWidth).length;
    document.title = 'pictures ' + shown.length + ' layers ' + layers.length + ' broken ' + broken +
      ' wide ' + (document.documentElement.scrollWidth > innerWidth);
  });
</script></body>"""


@pytest.fixture(scope="module", params=[["whole"], ["whole", "plain"]], ids=" and ".join)
def page(root, request, tmp_path_factory) -> Path:
    """Write a report of these runs with the probe in it."""
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    run_script("pretrain/report.py", *(str(root / run) for run in request.param), f"--out={path}")
    path.write_text(path.read_text().replace("</body>", PROBE))
    return path


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, which not every machine has")
@pytest.mark.parametrize("width_px", [1200, 600])
def test_report_draws_every_image_in_a_browser(page, width_px):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--window-size={width_px},900", "--dump-dom", page.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(pictures.*?)</title>", document)
    assert title is not None
    # Two splits of 6 samples, each with its image, the best images for its caption, and a layer for each of its words.
    counts = re.fullmatch(r"pictures (\d+) layers (\d+) broken 0 wide false", title[1])
    assert counts is not None, title[1]
    images, layers = int(counts[1]), int(counts[2])
    assert layers >= 2 * 6 and images >= 2 * 6 * (1 + 5) + layers


def test_sigint_saves_and_exits_75(root, emoji_shards):
    # Ctrl-C reaches a single process here; test_resume.py stops whole groups.
    import signal
    import time

    arguments = settings(root, emoji_shards, "interrupted", 500)
    command = command_line("pretrain/train.py", arguments)
    process = subprocess.Popen(command, cwd=REPO, env=script_environment({}), stderr=subprocess.PIPE, text=True)
    lines = root / "interrupted/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "the same command resumes from there" in errors
