"""orwcfm: online reward-weighted fine-tuning of flow-matching models with Wasserstein-2 regularisation."""

__version__ = "0.1.0"
