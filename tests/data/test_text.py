"""Token ids: RoBERTa's own, from files that are shipped."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaTokenizerFast

from bridgetower.data.corpora import Corpora
from bridgetower.data.text import SHIPPED_TOKENIZERS, Tokenizer, pad
from bridgetower.errors import ConfigError
from tests.conftest import run_script

SAME_EVERY_TIME = settings(derandomize=True, deadline=None)
ASSETS = Path(str(resources.files("bridgetower.data"))) / "assets"

AWKWARD = [
    "",
    "a",
    " leading and trailing ",
    "two  spaces",
    "A man, a plan; a canal: Panama!",
    "it's the dog's",
    "Ünïcödé naïve café",
    "日本語の説明文",
    "👩‍👩‍👧 family: woman, woman, girl",
    "tab\tand\nnewline",
    "no\u00a0break\u2003space",
    "e\u0301 is not é",
    "0123456789 $1,000.50",
    "x" * 300,
    "\u0000 control \u0007",
]


@pytest.fixture(scope="module")
def roberta() -> Tokenizer:
    return Tokenizer("roberta")


@pytest.fixture(scope="module", params=SHIPPED_TOKENIZERS)
def shipped(request) -> Tokenizer:
    return Tokenizer(request.param)


@pytest.fixture(scope="module")
def transformers_roberta() -> RobertaTokenizerFast:
    """The independent implementation, from the same two files."""
    return RobertaTokenizerFast(
        vocab=str(ASSETS / "roberta" / "vocab.json"), merges=str(ASSETS / "roberta" / "merges.txt")
    )


def test_known_captions_have_their_known_roberta_ids(roberta):
    # fairseq's dictionary.
    assert [row.tolist() for row in roberta.encode(["Hello world!", ""], 50)] == [[0, 31414, 232, 328, 2], [0, 2]]


def test_roberta_has_its_50265_ids_and_special_tokens(roberta):
    assert roberta.vocabulary_size == 50_265
    special = (roberta.start_id, roberta.pad_id, roberta.end_id, roberta.unknown_id, roberta.mask_id)
    assert special == (0, 1, 2, 3, 50_264)


def test_ids_equal_those_of_transformers(roberta, transformers_roberta, emoji_shards):
    corpora = Corpora([emoji_shards / "train"])
    captions = [
        caption
        for shard in range(len(corpora.shard_paths))
        for row in range(len(corpora.reader(shard)))
        for caption in corpora.reader(shard).read(row).record["captions"]
    ]
    assert len(captions) == 4510
    captions += AWKWARD
    expected = transformers_roberta(captions)["input_ids"]
    assert [row.tolist() for row in roberta.encode(captions, 10_000)] == expected


@SAME_EVERY_TIME
@given(st.text(max_size=40).filter(lambda text: "<" not in text))
def test_ids_of_any_text_equal_those_of_transformers(roberta, transformers_roberta, text):
    assert roberta.encode([text], 10_000)[0].tolist() == transformers_roberta(text)["input_ids"]


@SAME_EVERY_TIME
@given(st.text(max_size=40))
def test_any_text_is_its_decoded_ids_without_an_unknown_token(shipped, text):
    ids = shipped.encode([text], 10_000)[0]
    assert shipped.decode(ids.tolist()) == text
    assert not shipped.is_special(ids[1:-1]).any()


@pytest.mark.parametrize("special", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
def test_the_name_of_a_special_token_in_a_caption_is_only_text(shipped, special):
    ids = shipped.encode([f"a {special} b"], 50)[0]
    assert not shipped.is_special(ids[1:-1]).any()
    assert shipped.decode(ids.tolist()) == f"a {special} b"


def test_a_long_caption_loses_its_end_and_keeps_its_end_token(roberta, transformers_roberta):
    caption = "one two three four five six seven eight nine ten"
    (short,) = roberta.encode([caption], 6)
    assert short.tolist() == [*roberta.encode([caption], 50)[0][:5].tolist(), roberta.end_id]
    assert short.tolist() == transformers_roberta(caption, truncation=True, max_length=6)["input_ids"]


def test_a_caption_that_just_fits_is_whole(roberta):
    (whole,) = roberta.encode(["Hello world!"], 5)
    assert whole.tolist() == [0, 31414, 232, 328, 2]


def test_rows_are_padded_to_the_longest_of_them(roberta):
    rows = roberta.encode(["Hello world!", "Hello"], 50)
    assert pad(rows, roberta.pad_id).tolist() == [[0, 31414, 232, 328, 2], [0, 31414, 2, 1, 1]]


def test_the_shipped_emoji_tokenizer_is_what_build_tokenizer_makes_of_the_training_captions(emoji_shards, tmp_path):
    run_script(
        "data_prep/build_tokenizer.py", str(emoji_shards / "train"), "--vocabulary_size=1000", f"--out={tmp_path}/made"
    )
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "made" / file).read_bytes() == (ASSETS / "emoji" / file).read_bytes()


def test_a_folder_with_vocabulary_and_merges_is_a_tokenizer(tmp_path, roberta):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(ASSETS / "roberta" / file, tmp_path)
    own = Tokenizer(str(tmp_path))
    assert own.encode(AWKWARD, 50)[4].tolist() == roberta.encode(AWKWARD, 50)[4].tolist()


def test_an_unknown_tokenizer_is_refused_with_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"tokenizer='robberta'.*emoji, roberta"):
        Tokenizer("robberta")


def test_a_vocabulary_without_a_special_token_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ConfigError, match=r"lacks the special token.* <mask>"):
        Tokenizer(str(tmp_path))


def test_a_damaged_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<s>": 0, ')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ConfigError, match="is not a byte-level BPE"):
        Tokenizer(str(tmp_path))
