"""What a model says of some pairs, as the report shows it: pictures, guesses, and where each word looks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_THUMBNAIL_PX = 144
# What lies over the places of a picture that a word looks at.
_GLOW = (255, 72, 0)


class Pictures:
    """The pictures of a page, each of them there once, however often it is shown."""

    def __init__(self) -> None:
        """Begin with none."""
        self._names: dict[str, str] = {}

    def add(self, encoded: str) -> str:
        """Keep a picture file in base64. Returns: its name, a CSS class."""
        if encoded not in self._names:
            self._names[encoded] = f"p{len(self._names)}"
        return self._names[encoded]

    @property
    def rules(self) -> str:
        """CSS that gives each name its picture."""
        return "\n".join(
            f".{name} {{ background-image: url({_thumbnail(data)}) }}" for data, name in self._names.items()
        )


def describe_samples(split: str, content: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What the template shows of a split.

    Args:
        content: of ``predictions.json``.
    """
    names = {int(number): pictures.add(data) for number, data in content["pictures"].items()}
    return {
        "split": split,
        "samples": [
            {
                "caption": sample["caption"],
                "picture": names[sample["picture"]],
                "match": sample.get("match_probability"),
                "words": sample["masked_words"],
                "looks": [_look(**look) for look in sample.get("attention", [])],
                "captions": sample.get("best_captions", []),
                "pictures": [(names[number], *rest) for number, *rest in sample.get("best_pictures", [])],
            }
            for sample in content["samples"]
        ],
    }


def _look(token: str, shares: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A token with a layer for its picture that glows where it looks more than evenly, at most from twice that."""
    times_even_YX = np.asarray(shares) * np.size(shares)
    peak = float(times_even_YX.max())
    pixels = np.empty((*times_even_YX.shape, 4), np.uint8)
    pixels[..., :3] = _GLOW
    pixels[..., 3] = (225 * (times_even_YX - 1).clip(0) / max(1.0, peak - 1)).round()
    return {"token": token, "layer": _data_uri(Image.fromarray(pixels), "png"), "peak": peak}


def _thumbnail(encoded: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        kind = "png" if image.format == "PNG" and max(image.size) <= _THUMBNAIL_PX else "jpeg"
        picture = image.convert("RGB")
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _data_uri(picture, kind)


def _data_uri(picture: Image.Image, kind: str) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
