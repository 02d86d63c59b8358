"""Which modules the fields of an adapter's config name, as PEFT decides it.

Read from PEFT 0.21.2: `tuners_utils.py: check_target_module_exists`.
"""

from collections.abc import Callable, Collection

from .._text.automata import first_match
from .._text.regexes import compile_all
from ..errors import PeftError
from .config import PeftConfig, endings


def left_out_by(config: PeftConfig) -> Callable[[str], str]:
    """Returns a function from a module to the field that keeps PEFT from adapting it.

    The function returns nothing for a module that PEFT adapts, and where the config
    leaves the choice to the model: `"all-linear"`, or no targets at all.

    Raises:
      PeftError: if a pattern is broken or cannot be matched in one pass.

    Examples:
      >>> field = left_out_by(PeftConfig(r=1, alpha=1, targets=("q",), layers=(0,)))
      >>> field("x.h.0.q"), field("x.h.1.q"), field("x.h.0.k")
      ('', 'layers_to_transform', 'target_modules')
    """
    excludes = _matching("exclude_modules", config.excluded)
    named = targeting(config)
    whole = frozenset(config.targets if isinstance(config.targets, tuple) else ())

    def field(module: str) -> str:
        if excludes(module):
            return "exclude_modules"
        if not named(module):
            return "target_modules"
        if config.layers and module not in whole:
            layer = layer_of(module, config.layers_in)
            return "" if layer in config.layers else "layers_to_transform"
        return ""

    return field


def targeting(config: PeftConfig) -> Callable[[str], bool]:
    """Returns whether `target_modules` names a module, or leaves it to the model.

    Raises:
      PeftError: if a pattern is broken or cannot be matched in one pass.
    """
    targets = config.targets
    left = targets is None and not config.parameters
    if left or str(targets).lower() == "all-linear":
        return lambda _: True
    return _matching("target_modules", targets or ())


def _matching(field: str, wanted: tuple[str, ...] | str) -> Callable[[str], bool]:
    """Returns whether a module has an end in a list, or is what a pattern takes."""
    if not isinstance(wanted, str):
        names = frozenset(wanted)
        return lambda module: not names.isdisjoint(endings(module))
    try:
        pattern = compile_all({f"^(?:{wanted})$": 0})
    except ValueError as error:
        raise PeftError(f"{field}: {error}.") from error
    return lambda module: first_match(pattern, module) is not None


def layer_of(module: str, names: Collection[str] = ()) -> int | None:
    """Returns the number of a module's layer, as `layers_to_transform` counts it.

    Args:
      module: the module.
      names: what may stand before the number; without any, whatever does.

    Examples:
      >>> layer_of("model.layers.1.mlp.experts.0.w1"), layer_of("h.3.x", ["h"])
      (1, 3)
    """
    parts = module.split(".")
    for at in range(1 if names else 2, len(parts) - 1):
        if parts[at].isdecimal() and (not names or parts[at - 1] in names):
            return int(parts[at])
    return None
