"""What jlora raises and warns with; each says what was wanted and what to write."""


class JloraError(ValueError):
    """Base class of every error that jlora raises on purpose.

    Examples:
      >>> import jlora
      >>> try:
      ...     jlora.LoraConfig(rank=0)
      ... except JloraError as error:
      ...     print(error)
      LoraConfig: rank must be a positive integer, got 0.
    """


class ConfigError(JloraError):
    """A `LoraConfig` or `Rule` with a value that cannot work."""


class TargetError(JloraError):
    """A pattern, a leaf or a rank that cannot be planned; names the nearest match."""


class TreeError(JloraError):
    """Trees that do not belong together: paths, shapes or dtypes differ."""


class MergeError(JloraError):
    """A weight would be merged on the fly although `on_merge="error"`."""


class CheckpointError(JloraError):
    """A checkpoint that is missing, incomplete or not of this program's making."""


class PoolError(JloraError):
    """An adapter that a pool cannot hold or has no slot for."""


class PeftError(JloraError):
    """A Hugging Face file, or an adapter for one, that does not fit or is damaged."""


class MergeWarning(UserWarning):
    """A weight is merged on the fly: right, but slower than the factored route."""
