"""What arguments of the `jlora` command stand for: maps, models, configs."""

import contextlib
import dataclasses
import importlib
import operator
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from .. import files
from .._io.disk import Json, read_bounded
from .._plan.plan import Plan, plan as make_plan
from ..config import LoraConfig
from ..errors import ConfigError, JloraError, PeftError
from ..factors import Trainable

if TYPE_CHECKING:
    from ..peft import ExpertLayout, NameMap


def read(
    adapter: str,
    *,
    base: str | None = None,
    names: str | None = None,
    tied: bool | None = None,
    step: int | None = None,
    layout: str | None = None,
    component: str | None = None,
) -> Trainable:
    """Returns the adapter at a path; the other arguments are options of the command."""
    own, kept = name_map(names), layout_by_text("--layout", layout)
    if step is not None and files.detect(adapter) != "orbax":
        raise click.UsageError(f"--step: {adapter!r} is not an Orbax checkpoint.")
    given = {"--layout": kept, "--component": component}
    only = [option for option, value in given.items() if value is not None]
    if only and files.detect(adapter) != "peft":
        raise click.UsageError(f"{only[0]}: {adapter!r} is not an adapter of PEFT's.")
    return files.read(
        adapter,
        base=base,
        names=own,
        tied=tied,
        step=step,
        layout=kept,
        component=component,
    )


def layout_by_text(option: str, text: str | None) -> "ExpertLayout | None":
    """Returns the layout of experts that an option means; None for none."""
    from ..peft._experts import layout_of

    try:
        return layout_of(text)
    except PeftError as error:
        raise click.UsageError(f"{option}: {error}") from error


def name_map(names: str | None) -> "NameMap | None":
    """Returns the `NameMap` that `--names` means; None for none."""
    if names is None:
        return None
    from ..peft import NameMap, maps

    if ":" in names:
        found = attribute_of(names)
        if not isinstance(found, NameMap):
            raise click.UsageError(
                f"--names {names!r} is {type(found).__name__}, not a "
                "jlora.peft.NameMap."
            )
        return found

    known = [name for name in dir(maps) if name.isupper() and name[0] != "_"]
    if names.upper() not in known:
        raise click.UsageError(
            f"--names {names!r} is neither one of {', '.join(known).lower()} nor "
            "module:attribute."
        )
    return getattr(maps, names.upper())


def attribute_of(path: str) -> object:
    """Returns what `package.module:attribute` names, from here or installed."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise click.UsageError(f"{path!r} is not of the form package.module:attribute.")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        with _running(f"{path!r} cannot be imported"):
            return operator.attrgetter(attribute)(importlib.import_module(module))
    finally:  # the module may have changed either
        if here in sys.path:
            sys.path.remove(here)


@contextlib.contextmanager
def _running(what: str) -> Iterator[None]:
    """Raises what the user's own code raises in the block as a UsageError."""
    try:
        yield
    except JloraError:
        raise
    except Exception as error:
        raise click.UsageError(f"{what} ({type(error).__name__}: {error}).") from error


def planned(model: str, options: Json) -> Plan:
    """Returns the plan of the model that `package.module:attribute` names."""
    found = attribute_of(model)
    if callable(found):
        with _running(f"{model!r} cannot be called"):
            found = found()
    config = config_of(options)
    if isinstance(found, Plan):
        if config is not None:
            raise click.UsageError(f"{model!r} is a plan, with a config of its own.")
        return found
    if not (isinstance(found, tuple) and len(found) > 1 and callable(found[0])):
        raise click.UsageError(
            f"{model!r} is {type(found).__name__}, neither a jlora.Plan nor a tuple "
            "(function, params, *args)."
        )
    fn, params, *args = found
    with _running(f"{model!r} cannot be traced"):
        return make_plan(fn, params, *args, config=config or LoraConfig())


def config_of(options: Json) -> LoraConfig | None:
    """Returns the config of the options, None if there is none among them."""
    own = {k: v for k, v in options.items() if v not in (None, ()) and k != "config"}
    if options["config"] is None:
        return LoraConfig(**own) if own else None
    try:
        config = LoraConfig.from_json(read_bounded(options["config"]))
    except ConfigError as error:
        raise ConfigError(f"{options['config']!r}: {error}") from error
    return dataclasses.replace(config, **own)
