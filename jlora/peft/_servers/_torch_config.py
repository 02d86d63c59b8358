"""What PEFT refuses of an adapter's config, for one model, before it reads a tensor.

Read from PEFT 0.21.2: `tuners/lora/config.py: LoraConfig.__post_init__`,
`tuners/lora/model.py: LoraModel._create_new_module`, `tuners/lora/layer.py:
ParamWrapper.__init__`, `utils/other.py: set_additional_trainable_modules`,
`utils/save_and_load.py: set_peft_model_state_dict`, and the classes of `peft_model.py`.
"""

from collections.abc import Collection, Iterator, Mapping

from ..._io.torch_models import is_table, is_token_table
from ..config import Pattern, PeftConfig, names_module
from ..layers import TOKENS
from ._adapter import Adapter
from ._base import Base, Shape
from ._inits import fault_of
from ._report import Outcome
from ._targets import Targets

Told = tuple[str, Outcome, str, str]  # field, outcome, why, instead

_LINEAR_ONLY = ("lora_bias", "alora_invocation_tokens")
_TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)  # fmt: skip
_GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def of_fields(adapter: Adapter, base: Base, *, by_task: bool) -> Iterator[Told]:
    """Yields what PEFT refuses of the fields by themselves.

    Args:
      adapter: the adapter.
      base: for its class.
      by_task: whether PEFT makes a class of its own for the config's task.
    """
    fields = adapter.fields
    task, init = fields.get("task_type"), fields.get("init_lora_weights", True)
    if task is not None and task not in _TASKS:
        yield "task_type", "refused", "PEFT has no such task", "leave it out"
    generates = base.architecture.endswith(_GENERATIVE)
    if by_task and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not generates:
        why = f"{base.architecture} writes no text"
        yield "task_type", "refused", why, "leave it out, or write the model's task"
    layers = [fields.get(f"layers_{end}") for end in ("to_transform", "pattern")]
    if isinstance(fields.get("target_modules"), str) and layers != [None, None]:
        why = "PEFT takes it only beside a list of target_modules"
        yield "layers_to_transform", "refused", why, "write the names as a list"
    elif layers[1] and layers[0] is None:
        why = "PEFT takes it only beside layers_to_transform"
        yield "layers_pattern", "refused", why, "leave it out"
    if fields.get("lora_bias") and (type(init) is not bool or fields.get("use_dora")):
        why = "PEFT has it only with a plain init_lora_weights, and without DoRA"
        yield "lora_bias", "refused", why, "write init_lora_weights true"
    if fields.get("alora_invocation_tokens") and fields.get("use_dora"):
        yield "use_dora", "refused", "PEFT has no DoRA that is activated", "leave one"
    if init == "loftq" and not fields.get("loftq_config"):
        why = "PEFT needs loftq_config for it"
        yield "init_lora_weights", "refused", why, "write true"


def of_modules(
    adapter: Adapter,
    targets: Targets,
    modules: Mapping[str, Shape | None],
    tensors: Mapping[str, Shape | None],
) -> Iterator[Told]:
    """Yields what PEFT refuses of the fields for the modules that they name.

    Args:
      adapter: the adapter.
      targets: what it adapts.
      modules: the model's, as its class names them.
      tensors: likewise.
    """
    fields = adapter.fields
    adapted = [name for name in modules if targets.adapts(name)]
    for field in _LINEAR_ONLY:
        if fields.get(field) and any(map(is_table, adapted)):
            why = "PEFT has it only for linear layers"
            yield field, "refused", why, "leave the table out"
    init = fields.get("init_lora_weights", True)
    for name in adapted:
        rank, shape = adapter.rank(name), modules[name]
        if why := fault_of(init, rank, shape, table=is_table(name)):
            why = f"{why}, as for {name!r:.100} of rank {rank}"
            yield "init_lora_weights", "refused", why, "write true"
            break
    for name, shape in tensors.items():
        module, _, last = name.rpartition(".")
        narrow = shape is not None and len(shape) == 1 and module not in modules
        if narrow and last == "weight" and not targets.every and targets.adapts(module):
            why = f"PEFT does not adapt {module!r:.100}, which has one axis"
            yield "target_modules", "refused", why, "leave it out there"
            break
    yield from _of_parameters(adapter, {*adapted}, tensors)


def _of_parameters(
    adapter: Adapter, adapted: set[str], tensors: Mapping[str, Shape | None]
) -> Iterator[Told]:
    """Yields what PEFT refuses of `target_parameters`."""
    named = [
        name
        for name in tensors
        if any(names_module(entry, name) for entry in adapter.config.parameters)
    ]
    lacking = ("use_dora", "lora_bias", "lora_dropout", "alora_invocation_tokens")
    for field in lacking:
        if named and adapter.fields.get(field):
            why = f"PEFT does not have it for parameters, as {named[0]!r:.100}"
            yield field, "refused", why, "leave target_parameters out"
    both = [name for name in named if name.rpartition(".")[0] in adapted]
    if both:
        why = f"target_modules names the module of {both[0]!r:.100} too"
        yield "target_parameters", "refused", why, "leave it out in one of them"


def of_rows(
    adapter: Adapter,
    targets: Targets,
    modules: Mapping[str, Shape | None],
    ties: Mapping[str, Collection[str]],
    *,
    strict: bool,
) -> Iterator[Told]:
    """Yields what PEFT refuses of `trainable_token_indices`.

    Args:
      adapter: the adapter.
      targets: what it adapts.
      modules: the model's, as its class names them.
      ties: see `rows_of`.
      strict: whether the rows have to be in the file.
    """
    field = "trainable_token_indices"
    rows = {p.module: p for p in adapter.pieces if p.part == "tokens" and p.prefixed}
    entries = rows_of(adapter.config, ties)
    if entries is None:
        why = "PEFT keeps tied tables equal, and their rows differ"
        yield field, "refused", why, "write the same rows for both"
    for entry, ids in entries or ():
        tables = tables_of(entry, modules)
        if not tables:
            why = f"the model has no table {entry!r:.100}"
            yield field, "refused", why, "name the model's table"
        for table in tables:
            if (entry or table) in targets.listed:
                why = "modules_to_save names the table too"
                yield field, "refused", why, "leave it out in one of them"
            shape, piece = modules[table], rows.get(table)
            if targets.adapts(table):
                why = "target_modules names the table too"
                yield field, "refused", why, "leave it out in one of them"
            if piece is None and strict:
                why = f"the file has no {table}.{TOKENS}"
                yield field, "refused", why, "leave it out there"
            wanted = (len(ids), shape[1]) if shape is not None else None
            if piece is not None and wanted and piece.shape != wanted:
                why = f"the rows are {list(piece.shape)}, not {list(wanted)}"
                yield field, "refused", why, "write one id for each row"


def rows_of(
    config: PeftConfig, ties: Mapping[str, Collection[str]]
) -> Pattern[tuple[int, ...]] | None:
    """Returns the entries of `trainable_token_indices` that PEFT trains by themselves.

    Of several tables that are tied, with the same rows, it takes the first one's. None
    if their rows differ though `ensure_weight_tying` wants them equal.

    Args:
      config: the adapter's.
      ties: tables of the model, each with the modules that have the same weight.

    Examples:
      >>> rows = (("embed_tokens", (1,)), ("lm_head", (1,)))
      >>> config = PeftConfig(r=1, alpha=1, tokens=rows)
      >>> rows_of(config, {"model.embed_tokens": ["lm_head"]})
      (('embed_tokens', (1,)),)
    """
    rows = config.tokens
    for table, tied in ties.items() if len(rows) > 1 else ():
        parts = {part for name in tied for part in name.split(".")}
        alike = [
            (entry, ids)
            for entry, ids in rows
            if entry in parts or any(n.endswith(entry) for n in (table, *tied))
        ]
        if len({ids for _, ids in alike}) > 1:
            if config.tying:
                return None
        elif len(alike) > 1:
            rows = tuple(row for row in rows if row not in alike or row[0] not in tied)
    return rows


def tables_of(entry: str, modules: Mapping[str, Shape | None]) -> list[str]:
    """Returns the tables that an entry names; without one, the model's of tokens."""
    if entry:
        return [name for name in modules if name.endswith(entry)]
    tokens = [name for name in modules if is_token_table(name)]
    return sorted(tokens, key=lambda name: name.count("."))[:1]
