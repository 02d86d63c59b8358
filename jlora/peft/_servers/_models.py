"""What servers call the modules of each architecture: `models.json`, as records.

`tests/golden/make_servers.py` reads it from the servers' sources.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping

from ..._io.disk import Json
from ..._text.json_text import parse_json
from ...errors import PeftError

_ROOM = "jlora.peft._servers"
_NAMES = ("substr", "prefix", "suffix")
Names = tuple[tuple[str, str | None], ...]  # what is called how; None is left out


@dataclasses.dataclass(frozen=True)
class VllmModel:
    """What a model class of vLLM's says of adapters.

    Attributes:
      substr: parts of names, and what it calls them; in this order, each once.
      prefix: likewise, the beginnings of names, after `substr`.
      suffix: likewise, their ends, after `prefix`.
      packed: its own modules, and the parts that an adapter has instead.
      siblings: likewise, where a block of the base has all of the parts.
      embeddings: tables and heads that take an adapter.
      language: the text model in a model of several; only that takes an adapter.
      stacked_experts: whether an adapter has one tensor for all experts of a layer.
      skip: beginnings of names that are left out.
      odd: whether its names are decided when it runs.
    """

    substr: Names = ()
    prefix: Names = ()
    suffix: Names = ()
    packed: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    siblings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    language: str = ""
    stacked_experts: bool = False
    skip: tuple[str, ...] = ()
    odd: bool = False

    def renamed(self, module: str, *, loading: bool = False) -> str | None:
        """Returns what the class calls a module, as `WeightsMapper` does.

        Args:
          module: what files call it.
          loading: whether it is of the base, some of whose weights are left out: None.
            Of an adapter none are.
        """
        name = f"{module}.weight"
        for old, new in self.substr:
            if old in name and (new is not None or loading):
                if new is None:
                    return None
                name = name.replace(old, new, 1)
        for old, new in self.prefix:
            if name.startswith(old) and (new is not None or loading):
                if new is None:
                    return None
                name = new + name.removeprefix(old)
        for old, new in self.suffix:
            if name.endswith(old) and (new is not None or loading):
                if new is None:
                    return None
                name = name.removesuffix(old) + new
        return name.removesuffix(".weight")


@functools.cache
def _models() -> Json:
    return parse_json((importlib.resources.files(_ROOM) / "models.json").read_bytes())


def version_of(server: str) -> str:
    """Returns the version of a server that the records are of."""
    return _models()[server]["version"]


def sglang_modules() -> frozenset[str]:
    """Returns what SGLang calls the modules that take an adapter."""
    return frozenset(_models()["sglang"]["modules"])


def vllm_model(architecture: str) -> VllmModel | None:
    """Returns what vLLM's class says; None if it takes no adapters.

    Raises:
      PeftError: if vLLM has no such class, or its names are not known.
    """
    known = _models()["vllm"]["architectures"]
    found = next((n for n in _generative(architecture) if n in known), None)
    if found is None:
        raise PeftError(_unknown("vLLM", architecture))
    fields = known[found]
    if fields is None:
        return None
    own: Json = {
        key: tuple(map(tuple, value)) if key in _NAMES else value
        for key, value in fields.items()
    }
    model = VllmModel(**own)
    if model.odd:
        raise PeftError(
            f"vLLM decides what it calls the modules of {architecture!r} when it runs, "
            "so names alone do not tell. Load the adapter in vLLM, and compare its "
            "answers with the base's."
        )
    return model


def sglang_pattern(architecture: str) -> str:
    """Returns which modules of a class of SGLang's take adapters; empty for all.

    Raises:
      PeftError: if SGLang has no such class.
    """
    known = _models()["sglang"]["architectures"]
    found = next((n for n in _generative(architecture) if n in known), None)
    if found is None:
        raise PeftError(_unknown("SGLang", architecture))
    return known[found]


def fused_like(model_type: str) -> str:
    """Returns the type whose experts are fused alike in transformers, or nothing."""
    return _models()["transformers"]["architectures"].get(model_type, "")


def is_converted(model_type: str) -> bool:
    """Returns whether transformers converts the weights of a type of model."""
    return model_type in _models()["transformers"]["converted"]


def peft_targets(model_type: str) -> tuple[str, ...]:
    """Returns what PEFT adapts of a type of model if a config does not say."""
    return tuple(_models()["peft"]["architectures"].get(model_type, ()))


def llama_cpp_knows(architecture: str) -> bool:
    """Returns whether llama.cpp converts models of an architecture."""
    return architecture in _models()["llama.cpp"]["architectures"]


def is_classifier(architecture: str) -> bool:
    """Returns whether the model has a classification head."""
    return architecture.endswith(_CLASSIFIERS)


_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
_MADE_OF = ("ForCausalLM", "ForConditionalGeneration", "Model")


def _generative(architecture: str) -> tuple[str, ...]:
    """Returns the class, and those that a server makes a classifier from."""
    end = next((end for end in _CLASSIFIERS if architecture.endswith(end)), None)
    if end is None:
        return (architecture,)
    return (architecture, *(architecture.removesuffix(end) + e for e in _MADE_OF))


def _unknown(server: str, architecture: str) -> str:
    return (
        f"jlora does not know what {server} calls the modules of {architecture!r}: it "
        f"has no class of its own for it in version {version_of(server.lower())}."
    )
