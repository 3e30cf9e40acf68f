"""The one error family: every message quotes the case and says what to do."""

LONGEST = 1500  # characters of a message: a screen, whatever it quotes


class SqueezeViTError(Exception):
    """Base of everything this library raises on purpose; the command line turns it into exit code 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_middle(message))


def without_middle(text: str) -> str:
    """Text of a bounded length: what is too long loses its middle, as the case stands in front and the remedy at the end.

    >>> len(without_middle("x" * 9000)) <= LONGEST
    True
    """
    half = LONGEST // 2 - 30
    return text if len(text) <= LONGEST else f"{text[:half]} ... {len(text) - 2 * half} more characters ... {text[-half:]}"


class ConfigError(SqueezeViTError, ValueError):
    """A value that cannot be meant: a keep ratio of 0, a stage outside the model, a budget out of reach."""


class UnsupportedError(SqueezeViTError, TypeError):
    """A model, block or call that cannot be reduced correctly."""


class CheckpointError(SqueezeViTError, ValueError):
    """A file that is no checkpoint, or a checkpoint of something else."""


class DataError(SqueezeViTError, ValueError):
    """Images, folders or labels that cannot be used."""


class TrainingError(SqueezeViTError, RuntimeError):
    """A training run that cannot go on: a loss that is not finite, a checkpoint that cannot be written."""


class RunError(SqueezeViTError, RuntimeError):
    """A run over many photographs that cannot go on: Ray, a disk or a store failed; what is done stays."""


class MissingExtraError(SqueezeViTError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
