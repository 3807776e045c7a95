"""Fine-tune one language model on many tasks at once so that all of them converge together."""

__version__ = "0.1.0"
