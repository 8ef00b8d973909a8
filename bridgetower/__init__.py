"""BridgeTower: pretraining and fine-tuning of vision-language models (arXiv 2206.08657)."""

from typing import Any

__version__ = "0.1.0"

# Where each public name lives. It is looked for when it is used, so that importing the package costs nothing.
_PUBLIC = {
    "load_model": "bridgetower.interop.open",
    "BridgeTower": "bridgetower.model.bridgetower",
    "BridgeTowerError": "bridgetower.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"bridgetower has no {name!r}; its public names are {', '.join(_PUBLIC)}.")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*_PUBLIC, "__version__"]
