"""The errors that this package raises."""


class ModelError(ValueError):
    """The model cannot be loaded or trained as the configuration asks."""


class MissingKernel(ModelError):
    """The attention kernel that the configuration asks for is not installed here."""
