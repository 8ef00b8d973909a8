"""Token ids equal those of transformers, for the shipped tokenizers and for any tokenizer.json."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

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


def read_captions(emoji_shards: Path) -> list[str]:
    corpora = Corpora([emoji_shards / "train"])
    return [
        caption
        for shard in range(len(corpora.shard_paths))
        for row in range(len(corpora.reader(shard)))
        for caption in corpora.reader(shard).read(row).record["captions"]
    ]


@pytest.fixture(scope="module")
def roberta() -> Tokenizer:
    return Tokenizer("roberta")


@pytest.fixture(scope="module", params=SHIPPED_TOKENIZERS)
def shipped(request) -> Tokenizer:
    return Tokenizer(request.param)


@pytest.fixture(scope="module")
def transformers_roberta() -> RobertaTokenizerFast:
    """The independent implementation, opened from the same two files."""
    return RobertaTokenizerFast(
        vocab=str(ASSETS / "roberta" / "vocab.json"), merges=str(ASSETS / "roberta" / "merges.txt")
    )


def test_known_captions_have_their_known_roberta_ids(roberta):
    # Source: fairseq's dictionary.
    assert [row.tolist() for row in roberta.encode(["Hello world!", ""], 50)] == [[0, 31414, 232, 328, 2], [0, 2]]


def test_roberta_has_its_50265_ids_and_special_tokens(roberta):
    assert roberta.vocabulary_size == 50_265
    special = (roberta.start_id, roberta.pad_id, roberta.end_id, roberta.unknown_id, roberta.mask_id)
    assert special == (0, 1, 2, 3, 50_264)


def test_ids_equal_those_of_transformers(roberta, transformers_roberta, emoji_shards):
    captions = [*read_captions(emoji_shards), *AWKWARD]
    assert len(captions) == 4510 + len(AWKWARD)
    expected = transformers_roberta(captions)["input_ids"]
    assert [row.tolist() for row in roberta.encode(captions, 10_000)] == expected


@SAME_EVERY_TIME
@given(st.text(max_size=40).filter(lambda text: "<" not in text))
def test_ids_of_any_text_equal_those_of_transformers(roberta, transformers_roberta, text):
    assert roberta.encode([text], 10_000)[0].tolist() == transformers_roberta(text)["input_ids"]


@SAME_EVERY_TIME
@given(st.text(max_size=40))
def test_any_text_survives_encoding_and_decoding_without_an_unknown_token(shipped, text):
    ids = shipped.encode([text], 10_000)[0]
    assert shipped.decode(ids.tolist()) == text
    assert not shipped.is_special(ids[1:-1]).any()


@pytest.mark.parametrize("special", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
def test_the_name_of_a_special_token_in_a_caption_is_only_text(shipped, special):
    ids = shipped.encode([f"a {special} b"], 50)[0]
    assert not shipped.is_special(ids[1:-1]).any()
    assert shipped.decode(ids.tolist()) == f"a {special} b"


def test_a_long_caption_is_cut_off_before_its_end_token(roberta, transformers_roberta):
    caption = "one two three four five six seven eight nine ten"
    (short,) = roberta.encode([caption], 6)
    assert short.tolist() == [*roberta.encode([caption], 50)[0][:5].tolist(), roberta.end_id]
    assert short.tolist() == transformers_roberta(caption, truncation=True, max_length=6)["input_ids"]


def test_a_caption_that_just_fits_is_kept_whole(roberta):
    (whole,) = roberta.encode(["Hello world!"], 5)
    assert whole.tolist() == [0, 31414, 232, 328, 2]


def test_rows_are_padded_to_the_longest_row(roberta):
    rows = roberta.encode(["Hello world!", "Hello"], 50)
    assert pad(rows, roberta.pad_id).tolist() == [[0, 31414, 232, 328, 2], [0, 31414, 2, 1, 1]]


def test_build_tokenizer_makes_the_shipped_emoji_tokenizer_from_the_training_captions(emoji_shards, tmp_path):
    run_script(
        "data_prep/build_tokenizer.py", str(emoji_shards / "train"), "--vocabulary_size=1000", f"--out={tmp_path}/made"
    )
    for file in ("vocab.json", "merges.txt"):
        assert (tmp_path / "made" / file).read_bytes() == (ASSETS / "emoji" / file).read_bytes()


def test_a_folder_with_vocabulary_and_merges_is_a_tokenizer(tmp_path, roberta):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(ASSETS / "roberta" / file, tmp_path)
    copied = Tokenizer(str(tmp_path))
    assert copied.encode(AWKWARD, 50)[4].tolist() == roberta.encode(AWKWARD, 50)[4].tolist()


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


ROBERTA_NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_NAMES = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
NAMES = {"roberta_like": ROBERTA_NAMES, "bert_like": BERT_NAMES, "xlmr_like": ROBERTA_NAMES}


def train_roberta_like(captions: list[str]) -> Any:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=ROBERTA_NAMES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend


def train_bert_like(captions: list[str]) -> Any:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    # BERT's tokenizer order, in which [PAD] is 0.
    order = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        captions, trainers.WordPieceTrainer(vocab_size=600, special_tokens=order, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


def train_xlmr_like(captions: list[str]) -> Any:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=ROBERTA_NAMES, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


@pytest.fixture(scope="module")
def json_files(emoji_shards, tmp_path_factory) -> dict[str, Path]:
    """A tokenizer.json of each kind, trained with the library's tokenizer trainers."""
    files = {}
    captions = read_captions(emoji_shards)
    for train in (train_roberta_like, train_bert_like, train_xlmr_like):
        kind = train.__name__.removeprefix("train_")
        files[kind] = tmp_path_factory.mktemp(kind) / "tokenizer.json"
        train(captions).save(str(files[kind]))
    return files


@pytest.fixture(scope="module", params=NAMES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def json_file(json_files, kind) -> Path:
    return json_files[kind]


@pytest.fixture(scope="module")
def tokenizer(json_file) -> Tokenizer:
    return Tokenizer(str(json_file.parent))


def open_with_transformers(file: Path, names: list[str]) -> PreTrainedTokenizerFast:
    """Open the same file with the independent implementation."""
    start, padding, end, unknown, mask = names
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        cls_token=start,
        pad_token=padding,
        sep_token=end,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        mask_token=mask,
    )


@pytest.fixture(scope="module")
def transformers_tokenizer(json_file, kind) -> PreTrainedTokenizerFast:
    return open_with_transformers(json_file, NAMES[kind])


def change(file: Path, out: Path, **changes: Any) -> Tokenizer:
    """Open a copy of a tokenizer.json with other top-level fields. Fields of ``model`` are merged."""
    content = json.loads(file.read_text())
    content["model"] |= changes.pop("model", {})
    (out / "tokenizer.json").write_text(json.dumps(content | changes))
    return Tokenizer(str(out))


def special_ids(tokenizer: Tokenizer) -> list[int]:
    return [
        tokenizer.start_id,
        tokenizer.pad_id,
        tokenizer.end_id,
        tokenizer.unknown_id,
        tokenizer.mask_id,
    ]


def assert_only_text(tokenizer: Tokenizer, text: str, *, unknown_allowed: bool = False) -> None:
    inside = tokenizer.encode([text], 1000)[0][1:-1]
    refused = set(special_ids(tokenizer)) - ({tokenizer.unknown_id} if unknown_allowed else set())
    assert len(inside)
    assert refused.isdisjoint(inside.tolist())


def test_ids_of_a_tokenizer_json_equal_those_of_transformers(tokenizer, transformers_tokenizer, emoji_shards):
    captions = [*read_captions(emoji_shards), *AWKWARD]
    expected = transformers_tokenizer(captions)["input_ids"]
    assert [row.tolist() for row in tokenizer.encode(captions, 10_000)] == expected


@SAME_EVERY_TIME
@given(text=st.text(max_size=40).filter(lambda text: "<" not in text and "[" not in text))
def test_ids_by_a_tokenizer_json_of_any_text_equal_those_of_transformers(tokenizer, transformers_tokenizer, text):
    assert tokenizer.encode([text], 10_000)[0].tolist() == transformers_tokenizer(text)["input_ids"]


def test_a_long_caption_is_cut_off_as_transformers_does(tokenizer, transformers_tokenizer):
    caption = "one two three four five six seven eight nine ten"
    (short,) = tokenizer.encode([caption], 6)
    assert short.tolist() == transformers_tokenizer(caption, truncation=True, max_length=6)["input_ids"]


def test_special_tokens_of_a_tokenizer_json_are_those_of_transformers(tokenizer, transformers_tokenizer):
    assert special_ids(tokenizer) == [
        transformers_tokenizer.cls_token_id,
        transformers_tokenizer.pad_token_id,
        transformers_tokenizer.sep_token_id,
        transformers_tokenizer.unk_token_id,
        transformers_tokenizer.mask_token_id,
    ]
    assert tokenizer.vocabulary_size == len(transformers_tokenizer)


def test_a_caption_survives_encoding_and_decoding_by_a_tokenizer_json(tokenizer):
    caption = "grinning face with smiling eyes"
    assert tokenizer.decode(tokenizer.encode([caption], 50)[0].tolist()) == caption


@pytest.mark.parametrize("special", [*ROBERTA_NAMES, *BERT_NAMES])
def test_by_a_tokenizer_json_the_name_of_a_special_token_in_a_caption_is_only_text(tokenizer, kind, special):
    # Letters that the training captions lack, such as "<", are unknown to all but the byte-level BPE.
    for text in (f"a {special} b", special, f"a{special}b", f" {special}", special * 2):
        assert_only_text(tokenizer, text, unknown_allowed=kind != "roberta_like")


def test_a_unigram_whose_vocabulary_knows_every_letter_gives_the_name_of_a_special_token_no_special_id(tmp_path):
    backend = train_xlmr_like(["a <mask> and <s> or </s> or <unk> <pad>", "the mask has sunk in a padded box"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    text = "a <mask><s></s><unk> <pad>"
    # The unchanged model finds the names, even if special tokens are not matched.
    backend.encode_special_tokens = True
    assert tokenizer.mask_id in backend.encode(text, add_special_tokens=False).ids
    assert_only_text(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode([text], 100)[0].tolist()) == text


def test_a_wordpiece_that_sees_whole_words_gives_the_name_of_a_special_token_no_special_id(json_files, tmp_path):
    tokenizer = change(
        json_files["bert_like"], tmp_path, pre_tokenizer={"type": "WhitespaceSplit"}, normalizer=None, added_tokens=[]
    )
    assert_only_text(tokenizer, "a [MASK] [CLS] [SEP] [PAD]", unknown_allowed=True)


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_bpe_that_merges_to_the_name_of_a_special_token_gives_no_special_id(tmp_path, ignore_merges, as_text):
    merges = [("<", "s"), ("<s", ">"), ("<s>", "a"), ("a", "b")]
    vocabulary = [*ROBERTA_NAMES, "<", "s", ">", "a", "b", "<s", "<s>a", "ab"]
    model = {
        "type": "BPE",
        "vocab": {piece: number for number, piece in enumerate(vocabulary)},
        "merges": [" ".join(pair) for pair in merges] if as_text else merges,
        "unk_token": "<unk>",
        "ignore_merges": ignore_merges,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = Tokenizer(str(tmp_path))
    pieces = [vocabulary[number] for number in tokenizer.encode(["<s>ab"], 50)[0]]
    assert pieces == ["<s>", "<s", ">", "ab", "</s>"]
    assert_only_text(tokenizer, "<s>")
    assert tokenizer.encode(["axb"], 50)[0].tolist() == [0, vocabulary.index("a"), 3, vocabulary.index("b"), 2]


def test_a_special_token_that_a_file_lists_as_an_ordinary_added_one_is_still_only_text(json_file, tokenizer, tmp_path):
    added = json.loads(json_file.read_text())["added_tokens"]
    changed = change(json_file, tmp_path, added_tokens=[token | {"special": False} for token in added])
    for name in [token["content"] for token in added]:
        text = f"a {name} b"
        assert changed.encode([text], 50)[0].tolist() == tokenizer.encode([text], 50)[0].tolist()


def test_the_start_and_end_tokens_do_not_depend_on_the_template_of_the_file(json_file, tokenizer, tmp_path):
    changed = change(json_file, tmp_path, post_processor=None)
    for row, same in zip(changed.encode(AWKWARD, 50), tokenizer.encode(AWKWARD, 50), strict=True):
        assert row.tolist() == same.tolist()


def test_truncation_and_padding_of_the_file_are_not_used(json_file, tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(json_file))
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    captions = ["one two three four five six", "a"]
    assert [row.tolist() for row in Tokenizer(str(tmp_path)).encode(captions, 50)] == [
        row.tolist() for row in tokenizer.encode(captions, 50)
    ]


def test_bpe_dropout_of_the_file_is_not_used(json_files, tmp_path):
    tokenizer = change(json_files["roberta_like"], tmp_path, model={"dropout": 0.9})
    whole = Tokenizer(str(json_files["roberta_like"]))
    assert tokenizer.encode(["grinning face"], 50)[0].tolist() == whole.encode(["grinning face"], 50)[0].tolist()


@pytest.fixture
def file_with_additions(json_file, tmp_path) -> Path:
    """A tokenizer.json with special and ordinary added tokens in turn, all beyond the model's vocabulary."""
    backend = tokenizers.Tokenizer.from_file(str(json_file))
    backend.add_special_tokens(["<region>"])
    backend.add_tokens([AddedToken("hovercraft", single_word=True, normalized=True)])
    backend.add_special_tokens(["<box>"])
    backend.add_tokens(["eels"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_added_words_keep_their_ids(file_with_additions, tokenizer, kind):
    extended = Tokenizer(str(file_with_additions))
    text = "my hovercraft is full of eels, hovercrafts"
    (row,) = extended.encode([text], 50)
    assert row.tolist() == open_with_transformers(file_with_additions, NAMES[kind])(text)["input_ids"]
    assert {tokenizer.vocabulary_size + 1, tokenizer.vocabulary_size + 3} < set(row.tolist())
    assert "hovercraft" in extended.decode(row.tolist())


def test_the_vocabulary_size_includes_added_tokens(file_with_additions, tokenizer):
    assert Tokenizer(str(file_with_additions)).vocabulary_size == tokenizer.vocabulary_size + 4


def test_other_special_tokens_of_a_file_are_only_text(file_with_additions, tokenizer):
    text = "a <region> and a <box>"
    assert (
        Tokenizer(str(file_with_additions)).encode([text], 50)[0].tolist() == tokenizer.encode([text], 50)[0].tolist()
    )


def test_a_tokenizer_in_a_data_worker_gives_the_same_ids(file_with_additions):
    tokenizer = Tokenizer(str(file_with_additions))
    copy = pickle.loads(pickle.dumps(tokenizer))
    captions = [*AWKWARD, "my hovercraft is full of eels <mask> [MASK] <region>"]
    for row, same in zip(copy.encode(captions, 50), tokenizer.encode(captions, 50), strict=True):
        assert row.tolist() == same.tolist()
    assert (special_ids(copy), copy.vocabulary_size) == (special_ids(tokenizer), tokenizer.vocabulary_size)


def test_special_tokens_may_lie_beyond_the_vocabulary_of_the_model(tmp_path):
    model = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}
    added = [
        {"id": 2 + number, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, name in enumerate(ROBERTA_NAMES)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    tokenizer = Tokenizer(str(tmp_path))
    assert special_ids(tokenizer) == [2, 3, 4, 5, 6]
    assert tokenizer.vocabulary_size == 7
    # This model has no unknown token, so the library alone would raise an error at the letter x.
    assert tokenizer.encode(["abxa"], 50)[0].tolist() == [2, 0, 1, 5, 0, 4]


def test_the_vocabulary_size_includes_gaps_between_ids(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "<mask>": 9}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert Tokenizer(str(tmp_path)).vocabulary_size == 10


def test_a_file_of_an_older_library_without_the_model_type_is_opened(json_files, tmp_path):
    for kind in ("roberta_like", "bert_like"):
        content = json.loads(json_files[kind].read_text())
        del content["model"]["type"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        old, new = Tokenizer(str(tmp_path)), Tokenizer(str(json_files[kind]))
        assert old.encode(["grinning face"], 50)[0].tolist() == new.encode(["grinning face"], 50)[0].tolist()


@pytest.mark.parametrize("declared", [ROBERTA_NAMES, BERT_NAMES])
def test_of_two_names_the_declared_special_token_is_used_and_the_unknown_one_is_the_models(tmp_path, declared):
    # MPNet's vocabulary has the special tokens of both RoBERTa and BERT.
    vocabulary = {name: number for number, name in enumerate([*BERT_NAMES, *ROBERTA_NAMES, "a"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.add_special_tokens(declared)
    backend.save(str(tmp_path / "tokenizer.json"))
    start, padding, end, _, mask = (vocabulary[name] for name in declared)
    assert special_ids(Tokenizer(str(tmp_path))) == [start, padding, end, vocabulary["[UNK]"], mask]


def test_the_path_of_a_tokenizer_json_of_any_name_is_a_tokenizer(json_file, tokenizer, tmp_path):
    shutil.copy(json_file, tmp_path / "mine.json")
    direct = Tokenizer(str(tmp_path / "mine.json"))
    assert direct.encode(AWKWARD, 50)[1].tolist() == tokenizer.encode(AWKWARD, 50)[1].tolist()


def test_tokenizer_json_is_read_from_a_folder_with_both_kinds_of_files(json_file, tokenizer, tmp_path):
    shutil.copy(json_file, tmp_path)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(ASSETS / "roberta" / file, tmp_path)
    assert Tokenizer(str(tmp_path)).vocabulary_size == tokenizer.vocabulary_size


def test_the_error_about_a_folder_lists_everything_that_is_accepted(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Tokenizer(str(tmp_path))
    for part in ("emoji, roberta", "tokenizer.json", "vocab.json and merges.txt", "the path of", "save_pretrained"):
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", range(5))
def test_a_tokenizer_json_without_a_special_token_is_refused_with_the_file_and_its_names(tmp_path, missing):
    vocabulary = {name: number for number, name in enumerate(BERT_NAMES) if number != missing} | {"a": 5}
    tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError) as caught:
        Tokenizer(str(tmp_path))
    assert f"{tmp_path / 'tokenizer.json'} lacks" in str(caught.value)
    assert f"{ROBERTA_NAMES[missing]} or {BERT_NAMES[missing]}." in str(caught.value)


def broken_contents() -> Iterator[Any]:
    yield pytest.param(b'{"version": "1.0", "model": {', id="cut off")
    yield pytest.param(b"", id="empty")
    yield pytest.param(b"\xff\xfe\x00", id="not text")
    yield pytest.param(b'["<s>", "<pad>"]', id="a list")
    yield pytest.param(b'{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}', id="a vocab.json")
    yield pytest.param(b'{"tokenizer_class": "BertTokenizer", "do_lower_case": true}', id="a tokenizer_config.json")
    yield pytest.param(b'{"version": "1.0", "added_tokens": [], "model": {"type": "Fish"}}', id="an unknown model")


@pytest.mark.parametrize("content", broken_contents())
def test_a_damaged_or_foreign_tokenizer_json_is_refused_with_a_suggestion(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer.json is damaged, or not a tokenizer.json .*Copy it again"):
        Tokenizer(str(tmp_path))


def test_a_tokenizer_json_of_whole_words_is_refused(tmp_path):
    vocabulary = {name: number for number, name in enumerate(BERT_NAMES)}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="holds a WordLevel model, not one of BPE, WordPiece, Unigram"):
        Tokenizer(str(tmp_path))


def test_an_added_token_whose_id_the_library_would_change_is_refused(file_with_additions, tokenizer):
    content = json.loads(file_with_additions.read_text())
    content["added_tokens"][-1]["id"] = 5000
    file_with_additions.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"'eels' the id 5000, .* as {tokenizer.vocabulary_size + 3}"):
        Tokenizer(str(file_with_additions))
