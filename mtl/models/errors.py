"""What every part of this package raises."""


class ModelError(ValueError):
    """The model cannot be loaded or trained as the configuration asks."""
