"""The rules of each server, with the version and the place they were read from."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Literal

from ..._io.disk import Json
from ...errors import PeftError
from ._models import version_of
from ._report import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldRule:
    """What a server makes of a field of `adapter_config.json`.

    Attributes:
      field: its name.
      fine: whether a value makes no difference.
      outcome: what happens otherwise: `"refused"` the adapter, or `"altered"` its
        tensors.
      why: the reason.
      instead: what to do instead.
      place: where the server's source says so.
      by_module: whether the field's keys name the modules that are altered.
    """

    field: str
    fine: Callable[[object], bool]
    outcome: Outcome
    why: str
    instead: str
    place: str
    by_module: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """What a server takes.

    Attributes:
      name: as `--for` has it.
      version: the version whose source was read.
      place: the file that looks tensors up by name.
      required: fields that the config must have.
      fields: rules on fields of the config.
      ranks: what `option` may be; empty if it may be any rank. The last one is the
        largest that the server takes.
      option: what starts the server with a larger rank.
      shards: whether it reads an adapter in several files.
      smaller: what it does with factors that are smaller than the weight's axes.
      other_rank: what it does with factors of another rank than the config's.
      one_factor: what it does with A or B alone.
    """

    name: str
    version: str
    place: str
    required: tuple[str, ...] = ()
    fields: tuple[FieldRule, ...] = ()
    ranks: tuple[int, ...] = ()
    option: str = ""
    shards: bool = False
    smaller: Literal["altered", "refused"] = "refused"
    other_rank: Literal["altered", "refused"] = "refused"
    one_factor: Literal["altered", "refused"] = "refused"


def _off(value: object) -> bool:
    return not value


def _only(*values: object) -> Callable[[object], bool]:
    return lambda value: value in values


def _all_of(*names: str) -> Callable[[object], bool]:
    """Returns whether a value is a list of these names, or nothing."""
    return lambda value: (
        not value or (isinstance(value, list) and all(name in names for name in value))
    )


def _harmless_init(*names: str) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or value.lower() in names


def _list_or(*names: str) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or value in names


_MERGE = "merge it, with `jlora merge`, and serve the merged model"
_REBASE = "convert it to plain LoRA where it was trained, or call jlora.rebase"


def _refused(
    field: str, place: str, why: str, instead: str = _MERGE, fine=_off
) -> FieldRule:
    return FieldRule(
        field=field, fine=fine, outcome="refused", why=why, instead=instead, place=place
    )


_HELPER = "vllm/lora/peft_helper.py: PEFTHelper._validate_features"
VLLM = Server(
    name="vllm",
    version=version_of("vllm"),
    place="vllm/lora/lora_model.py: LoRAModel.from_local_checkpoint",
    required=("r", "lora_alpha", "target_modules"),
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    option="--max-lora-rank",
    smaller="altered",
    other_rank="altered",
    fields=(
        _refused("use_dora", _HELPER, "vLLM has no DoRA"),
        _refused("lora_bias", _HELPER, "vLLM has no bias of lora_B"),
        _refused(
            "init_lora_weights",
            _HELPER,
            "this init changed the base",
            _REBASE,
            _harmless_init("gaussian", "eva", "orthogonal", "mica", "lora_ga"),
        ),
        _refused("alora_invocation_tokens", _HELPER, "vLLM has no activated LoRA"),
        _refused("layer_replication", _HELPER, "vLLM has no replicated layers"),
        _refused("use_bdlora", _HELPER, "vLLM has no block-diagonal LoRA"),
        _refused("use_qalora", _HELPER, "vLLM has no QALoRA"),
        _refused(
            "bias",
            "vllm/lora/peft_helper.py: PEFTHelper.validate_legal",
            "vLLM has no trained biases",
            fine=_only("none", None),
        ),
        _refused(
            "modules_to_save",
            _HELPER,
            "vLLM takes only `classifier` and `score` whole",
            fine=_all_of("classifier", "score"),
        ),
    ),
)


def _one_scale(server: str, place: str) -> tuple[FieldRule, FieldRule]:
    """Returns the rules of a server whose scale is `alpha / r`, of one alpha."""
    return (
        FieldRule(
            field="use_rslora",
            fine=_off,
            outcome="altered",
            why=f"{server}'s scale is alpha / r, and not alpha / sqrt(r)",
            instead="write lora_alpha * sqrt(r) as lora_alpha, and use_rslora false",
            place=place,
        ),
        FieldRule(
            field="alpha_pattern",
            fine=_off,
            outcome="altered",
            why=f"{server} has one alpha for all modules",
            instead="write lora_B times the ratio of the alphas, and no alpha_pattern",
            place=place,
            by_module=True,
        ),
    )


_SGLANG_SCALE = "sglang/srt/lora/lora.py: LoRAAdapter.__init__"
SGLANG = Server(
    name="sglang",
    version=version_of("sglang"),
    place="sglang/srt/lora/mem_pool.py: LoRAMemoryPool.load_lora_weight_to_buffer",
    required=("r", "lora_alpha", "target_modules"),
    option="--max-lora-rank",
    shards=True,
    fields=(
        _refused(
            "use_dora",
            "sglang/srt/lora/lora_manager.py: LoRAManager.validate_new_adapter",
            "SGLang has no DoRA",
        ),
        _refused(
            "target_modules",
            "sglang/srt/lora/utils.py: get_normalized_target_modules",
            "SGLang takes a list of names, and not a pattern",
            "write the names of the modules as a list",
            _list_or("all", "all-linear"),
        ),
        *_one_scale("SGLang", _SGLANG_SCALE),
        FieldRule(
            field="rank_pattern",
            fine=_off,
            outcome="altered",
            why="SGLang has one rank for all modules, and scales by it",
            instead="write factors of rank r, and no rank_pattern",
            place=_SGLANG_SCALE,
            by_module=True,
        ),
    ),
)

_CONVERTER = "convert_lora_to_gguf.py"
_ADAPTER_CPP = "src/llama-adapter.h: llama_adapter_lora_weight::get_scale"
LLAMA_CPP = Server(
    name="llama.cpp",
    version="0.3.36 of llama-cpp-python",
    place=f"{_CONVERTER}: LoraModel.get_tensors",
    other_rank="altered",
    required=("lora_alpha",),
    fields=(*_one_scale("llama.cpp", _ADAPTER_CPP),),
)
PEFT = Server(
    name="peft",
    version="0.21.2",
    place="peft/utils/save_and_load.py: set_peft_model_state_dict",
    one_factor="altered",
)
TRANSFORMERS = Server(
    name="transformers",
    version="5.24.0",
    place="transformers/integrations/peft.py: PeftAdapterMixin.load_adapter",
    one_factor="altered",
)
SERVERS = {s.name: s for s in (VLLM, SGLANG, PEFT, TRANSFORMERS, LLAMA_CPP)}


def find_server(name: str) -> Server:
    """Returns the rules of a server.

    Raises:
      PeftError: if jlora has none of that name.
    """
    if name not in SERVERS:
        raise PeftError(
            f"server must be one of {', '.join(SERVERS)}, got {name!r:.50}."
        )
    return SERVERS[name]


def started(server: Server, given: int | None) -> Server:
    """Returns the rules of a server that takes no larger rank than `given`.

    Raises:
      PeftError: if it cannot be started with the limit that is `given`.
    """
    if given is not None and server.ranks and given not in server.ranks:
        raise PeftError(
            f"{server.name} {server.version} has no {server.option} {given}, only "
            f"{', '.join(map(str, server.ranks))}."
        )
    if given is None:
        return server
    ranks = tuple(rank for rank in server.ranks if rank <= given) or (given,)
    return dataclasses.replace(server, ranks=ranks)


def fields_of_module(rule: FieldRule, fields: Json) -> Collection[str]:
    """Returns the keys of a field that name modules, where it has some."""
    value = fields.get(rule.field)
    return value.keys() if rule.by_module and isinstance(value, dict) else ()
