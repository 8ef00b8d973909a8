"""The report of a run shows what the run has written, and text that people wrote cannot become markup."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bridgetower.config.overrides import apply_overrides
from bridgetower.config.snapshot import Identity, write_run_file
from bridgetower.errors import ConfigError, DataError
from pretrain.presets import tiny
from pretrain.report import render
from tests.conftest import run_script

EVIL = "<script>alert(\"1\")</script> & 'so on'"


class Tags(HTMLParser):
    """The elements that a browser would find, and the text that it would show."""

    def __init__(self, page):
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)

    def handle_data(self, data):
        self.text += data


def start_run(folder, **overrides):
    folder.mkdir(parents=True, exist_ok=True)
    identity = Identity(data_digests={}, optimizer="torch", precision="fp32", contrast_pairs=0)
    config = apply_overrides(tiny(), {"data.train_shards": "nowhere/train", "data.eval_shards": "nowhere/test"})
    write_run_file(folder, apply_overrides(config, overrides), identity, world_size=2, device="cpu")
    return folder


def encode_image():
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def add_scores(folder, caption, split="test"):
    scores = {"itm_balanced_accuracy": 0.75, "t2i_r1": 0.5, "mlm_loss": 1.5}
    chance = {"itm_balanced_accuracy": 0.5, "t2i_r1": 0.01}
    part = {"scores": scores, "chance": chance}
    (folder / "eval.json").write_text(
        json.dumps({"step": 20, "headline_split": split, **scores, "splits": {split: part}})
    )
    word = {"before": caption, "word": caption, "after": caption, "guesses": [[caption, 0.5]], "is_right": True}
    sample = {
        "caption": caption,
        "picture": 0,
        "masked_words": [word],
        "match_probability": 0.25,
        "attention": [{"token": caption, "shares": [[0.0, 0.35], [0.5, 0.1]]}],
        "best_captions": [[caption, False, 0.125]],
        "best_pictures": [[0, True, None]],
    }
    content = {"samples": [sample], "pictures": {"0": encode_image()}}
    (folder / "predictions.json").write_text(json.dumps({"step": 20, "splits": {split: content}}))


def test_run_that_has_just_begun_has_a_report_that_says_what_is_missing(tmp_path):
    folder = start_run(tmp_path / "new")
    result = run_script("pretrain/report.py", str(folder))
    assert result.stdout.startswith(str(folder / "report.html"))
    shown = Tags((folder / "report.html").read_text()).text
    for text in ("Not evaluated yet", "No metrics have been written yet", "not on this machine", "0 of 720 steps"):
        assert text in shown


def test_report_can_be_written_elsewhere_without_touching_the_run(tmp_path):
    folder = start_run(tmp_path / "new")
    run_script("pretrain/report.py", str(folder), f"--out={tmp_path / 'pages' / 'new.html'}")
    assert (tmp_path / "pages" / "new.html").is_file() and [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "There is no nowhere/run.json"),
        (["nowhere", "--oout=x"], "Unknown flag --oout. Did you mean --out?"),
    ],
)
def test_wrong_command_exits_2(words, expected):
    result = run_script("pretrain/report.py", *words, code=2)
    assert result.stderr.startswith("error: ") and expected in result.stderr and "Traceback" not in result.stderr


def test_captions_and_words_with_html_in_them_are_shown_as_they_are(tmp_path):
    pages = {}
    for name, caption in (("plain", "a caption"), ("evil", EVIL)):
        add_scores(start_run(tmp_path / name), caption)
        pages[name] = Tags(render(tmp_path / name))
    assert pages["evil"].names == pages["plain"].names
    # The caption, the masked word with the words before and after it, the guess, the best caption, and the token.
    assert pages["evil"].text.count(EVIL) == 7


def test_names_with_html_in_them_are_shown_as_they_are(tmp_path):
    pages = {}
    for name, mark in (("plain", ""), ("evil", "<b>")):
        folder = start_run(tmp_path / f"{mark}run", **{"data.train_shards": f"{mark}train", "name": f"{mark}name"})
        add_scores(folder, "a caption", split=f"{mark}split")
        line = {"step": 10, f"train/loss/{mark}loss": 2.5, f"eval/{mark}split/t2i_r1": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        pages[name] = Tags(render(folder))
    assert pages["evil"].names == pages["plain"].names
    for name in ("run", "train", "name", "split"):
        assert f"<b>{name}" in pages["evil"].text


def test_scores_stand_beside_their_chance_levels(tmp_path):
    folder = start_run(tmp_path / "scored")
    add_scores(folder, "a caption")
    shown = " ".join(Tags(render(folder)).text.split())
    assert "ITM balanced accuracy (random negatives)75.0%test split, chance 50.0%" in shown
    assert "text-to-image R@1, with ITM50.0% chance 1.0%" in shown
    assert "MLM loss (nats per token)1.500" in shown and "after step 20" in shown


def test_curves_are_drawn_of_the_metrics_that_are_there(tmp_path):
    folder = start_run(tmp_path / "drawn")
    lines = [
        {"step": step, "train/loss/mlm": 5.0 - step, "optim/lr/base": 1e-5, "optim/grad_norm": 1.0} for step in (1, 2)
    ]
    # The last line is being written.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tra')
    page = render(folder)
    assert page.count("<svg") == 3
    assert "Losses" in page and "2 of 720 steps" in page and "Training accuracy" not in page


def test_scores_that_are_no_json_are_an_error_that_says_what_to_do(tmp_path):
    folder = start_run(tmp_path / "broken")
    (folder / "eval.json").write_text("{")
    with pytest.raises(DataError, match=r"eval\.json is not JSON .* Delete it"):
        render(folder)


def test_folder_of_something_else_is_an_error(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {}}')
    with pytest.raises(ConfigError, match=r"is not the run\.json of a run"):
        render(tmp_path)


def test_runs_are_compared_score_by_score_curve_by_curve_and_setting_by_setting(tmp_path):
    folders = [
        start_run(tmp_path / "one", **{"optim.base_lr": "1e-4", "name": "one"}),
        start_run(tmp_path / "two", **{"optim.base_lr": "5e-4", "name": "two"}),
    ]
    for folder, rate in zip(folders, (1e-4, 5e-4), strict=True):
        line = {"step": 10, "train/loss/mlm": 2.5, "train/loss/itm": 0.5, "optim/lr/base": rate}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    add_scores(folders[1], "a caption")
    run_script("pretrain/report.py", *map(str, folders))
    page = (tmp_path / "report.html").read_text()
    shown = " ".join(Tags(page).text.split())
    # A chart per metric, in which each run has its own colour.
    assert page.count("<svg") == 3 and "Losses: mlm" in page and "Losses: itm" in page and "Learning rate" in page
    for chart in page.split("<svg")[1:]:
        assert "#2563a8" in chart and "#c8553d" in chart
    assert "optim.base_lr0.00010.0005" in shown and "optim.total_steps" not in shown.split("Settings of one")[0]
    assert "two, after step 20" in shown and "one: Not evaluated yet" in shown and "75.0%" in shown
    assert "Predictions of two: test" in shown


def test_runs_with_the_same_name_are_distinguished_by_their_folders(tmp_path):
    page = render(start_run(tmp_path / "a/same"), start_run(tmp_path / "b/same"))
    assert "a-same · b-same" in Tags(page).text


def test_run_that_is_given_twice_is_an_error(tmp_path):
    folder = start_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="is given twice"):
        render(folder, tmp_path / "run")


def test_attention_is_coloured_where_it_is_above_uniform(tmp_path):
    folder = start_run(tmp_path / "attention")
    add_scores(folder, "a caption")
    page = render(folder)
    encoded = re.search(r'<div class="image attention p0"><img src="data:image/png;base64,([^"]+)"', page)
    assert encoded is not None
    opacity = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))[..., 3]
    # Attention of 0, 0.35, 0.5 and 0.1, where uniform is 0.25: only patches above uniform are coloured.
    assert opacity.tolist() == [[0, 90], [225, 0]] and "2.0×" in page


def test_image_that_is_shown_often_is_in_the_page_once(tmp_path):
    folder = start_run(tmp_path / "once")
    add_scores(folder, "a caption")
    page = render(folder)
    assert page.count("image p0") == 2 and page.count("background-image: url(") == 1
