"""BridgeTower: pretraining and fine-tuning of vision-language models (arXiv 2206.08657)."""

__version__ = "0.1.0"
