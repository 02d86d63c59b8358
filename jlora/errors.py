"""The errors and warnings of jlora; each says what was wanted and what to write."""

_MOST = 20_000  # characters of a message, whatever names it quotes


def _cut(text: str) -> str:
    """Returns `text` without its middle if it is too long for anyone to read."""
    if len(text) <= _MOST:
        return text
    return f"{text[: _MOST // 2]} [{len(text) - _MOST} more] {text[-_MOST // 2 :]}"


class JloraError(ValueError):
    """Base class of the errors that jlora raises.

    Examples:
      >>> import jlora
      >>> try:
      ...     jlora.LoraConfig(rank=0)
      ... except JloraError as error:
      ...     print(error)
      LoraConfig: rank must be a positive integer, got 0.
    """

    def __init__(self, message: object = ""):
        super().__init__(_cut(str(message)))


class ConfigError(JloraError):
    """A `LoraConfig`, `Rule` or argument with a value that cannot work."""


class TargetError(JloraError):
    """A pattern, a leaf or a rank that cannot be planned; names the nearest match."""


class TreeError(JloraError):
    """Trees that do not belong together: paths, shapes or dtypes differ."""


class MergeError(JloraError):
    """A weight that cannot be merged as asked.

    It would be merged on the fly although `on_merge="error"`, or to numbers that its
    dtype does not hold although `check=True`.
    """


class CheckpointError(JloraError):
    """A checkpoint that is missing or incomplete, or that jlora did not write."""


class PoolError(JloraError):
    """An adapter that a pool cannot hold or has no slot for."""


class PeftError(JloraError):
    """A Hugging Face file, or an adapter for one, that does not fit or is damaged."""


class MergeWarning(UserWarning):
    """A weight is merged on the fly: correct, but slower than the factored route."""
