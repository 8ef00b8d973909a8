"""The model's predictions for some pairs as the report shows them: images, guesses, and attention of each word."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_THUMBNAIL_PX = 144
# Colour over the patches of an image that a word attends to.
_ATTENTION_RGB = (255, 72, 0)
_MAX_OPACITY = 225


class PageImages:
    """The images of a page: each is in the page once, however often it is shown."""

    def __init__(self) -> None:
        """Begin without images."""
        self._names: dict[str, str] = {}

    def add(self, encoded: str) -> str:
        """Add an image file.

        Args:
            encoded: the file in base64.

        Returns: the CSS class that shows the image.
        """
        if encoded not in self._names:
            self._names[encoded] = f"p{len(self._names)}"
        return self._names[encoded]

    @property
    def rules(self) -> str:
        """CSS rules that give each class its image."""
        return "\n".join(
            f".{name} {{ background-image: url({_thumbnail(data)}) }}" for data, name in self._names.items()
        )


def describe_samples(split: str, content: Mapping[str, Any], images: PageImages) -> dict[str, Any]:
    """Return what the template shows of a split.

    Args:
        content: part of ``predictions.json`` about the split.
        images: images of the page, which the split's are added to.
    """
    names = {int(number): images.add(data) for number, data in content["pictures"].items()}
    return {
        "split": split,
        "samples": [
            {
                "caption": sample["caption"],
                "image": names[sample["picture"]],
                "match": sample.get("match_probability"),
                "words": sample["masked_words"],
                "attention": [_draw_attention(**word) for word in sample.get("attention", [])],
                "captions": sample.get("best_captions", []),
                "images": [(names[number], *rest) for number, *rest in sample.get("best_pictures", [])],
            }
            for sample in content["samples"]
        ],
    }


def _draw_attention(token: str, shares: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return a token with an overlay for its image, coloured where attention is above uniform.

    Args:
        shares: attention probability of each patch, row by row.
    """
    times_uniform_YX = np.asarray(shares) * np.size(shares)
    peak = float(times_uniform_YX.max())
    pixels = np.empty((*times_uniform_YX.shape, 4), np.uint8)
    pixels[..., :3] = _ATTENTION_RGB
    # Opacity reaches its maximum at the peak, but not below twice uniform: nearly even attention stays pale.
    pixels[..., 3] = (_MAX_OPACITY * (times_uniform_YX - 1).clip(0) / max(1.0, peak - 1)).round()
    return {"token": token, "overlay": _data_uri(Image.fromarray(pixels), "png"), "peak": peak}


def _thumbnail(encoded: str) -> str:
    """Return a small copy of an image file in base64 as a data URI; a small PNG stays a PNG."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        file_format = "png" if image.format == "PNG" and max(image.size) <= _THUMBNAIL_PX else "jpeg"
        thumbnail = image.convert("RGB")
    thumbnail.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return _data_uri(thumbnail, file_format)


def _data_uri(image: Image.Image, file_format: str) -> str:
    stream = io.BytesIO()
    image.save(stream, file_format, **({"optimize": True} if file_format == "png" else {"quality": 85}))
    return f"data:image/{file_format};base64,{base64.b64encode(stream.getvalue()).decode()}"
