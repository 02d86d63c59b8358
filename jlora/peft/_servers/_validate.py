"""`validate`: what a server does with each tensor of an adapter."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..._io.disk import Path
from ...errors import PeftError
from ..config import pattern_lookup
from . import _llama_cpp, _sglang, _torch, _vllm
from ._adapter import Adapter, Piece, read_adapter
from ._base import Base, read_base
from ._fit import FACTORS
from ._layouts import with_layout
from ._refusals import of_config, top_rank
from ._report import ServerReport, Verdict
from ._rules import (
    FieldRule,
    Server,
    fields_of_module,
    find_server,
    started,
)


def validate(
    directory: Path, base: Path, *, server: str = "vllm", max_rank: int | None = None
) -> ServerReport:
    """Returns what a server does with each tensor of an adapter of PEFT's.

    Servers look tensors up by name. Of one that they do not find, most say nothing and
    answer as the base does. This tells it beforehand. Only names, shapes and configs
    are read: no weight is, and of the base an index and `config.json` are enough.

    Args:
      directory: the adapter, with `adapter_config.json`, as `jlora.peft.save` and PEFT
        write it.
      base: the directory of the model that the server runs.
      server: `"vllm"`, `"sglang"`, `"peft"`, `"transformers"` or `"llama.cpp"`.
      max_rank: the `--max-lora-rank` that the server is started with; None is any.

    Raises:
      PeftError: if a file is missing or damaged, or nothing is known of what the server
        calls this model's modules.

    Examples:
      >>> import json, pathlib, tempfile, numpy as np, jlora
      >>> a, b = np.ones((4, 2), np.float32), np.ones((2, 4), np.float32)
      >>> own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=4))
      >>> names = ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     model = pathlib.Path(folder)
      ...     config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
      ...     _ = (model / "config.json").write_text(json.dumps(config))
      ...     index = {"weight_map": {f"{name}.weight": "1" for name in names}}
      ...     _ = (model / "model.safetensors.index.json").write_text(json.dumps(index))
      ...     adapter = jlora.Trainable({"layers/0/self_attn/q_proj/kernel": own})
      ...     jlora.peft.save(model / "adapter", adapter)
      ...     report = validate(model / "adapter", model, server="vllm")
      >>> report.fine, report.verdicts[0].outcome, report.verdicts[0].instead
      (False, 'dropped', "the base has 'model.layers.0.self_attn.q_proj'")
    """
    rules = started(find_server(server), max_rank)
    adapter = read_adapter(pathlib.Path(directory))
    about = read_base(base)
    judge = _judge(rules, adapter, about)
    found = [*of_config(rules, adapter), *judge.of_config()]
    own = [judge.verdict(piece) for piece in adapter.pieces]
    own = [
        with_layout(_altered(rules, adapter, *pair), pair[0], adapter, judge.layouts)
        for pair in zip(adapter.pieces, own, strict=True)
    ]
    refused = any(v.outcome == "refused" for v in found + own)
    if refused:
        why = "the whole adapter is refused"
        own = [
            v
            if v.outcome == "refused"
            else Verdict(name=v.name, outcome="refused", why=why)
            for v in own
        ]
    return ServerReport(
        server=rules.name,
        version=rules.version,
        verdicts=(*found, *own),
        notes=_notes(rules, adapter, max_rank),
    )


class _Judge(Protocol):
    """How a server looks tensors up."""

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what it does with a tensor."""
        ...

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts of experts that it reads, the best first."""
        ...

    def of_config(self) -> Iterable[Verdict]:
        """Returns what it refuses before it reads a tensor."""
        ...


def _judge(server: Server, adapter: Adapter, base: Base) -> _Judge:
    match server.name:
        case "vllm":
            return _vllm.Lookup(server, adapter, base)
        case "sglang":
            return _sglang.Lookup(adapter, base)
        case "llama.cpp":
            return _llama_cpp.Lookup(adapter, base)
    return _torch.Lookup(server, adapter, base)


def _altered(
    server: Server, adapter: Adapter, piece: Piece, verdict: Verdict
) -> Verdict:
    """Returns the verdict, with what the server computes otherwise."""
    if verdict.outcome != "applied" or piece.part not in FACTORS:
        return verdict
    for rule in server.fields:
        if rule.outcome == "altered" and _concerns(rule, adapter, piece.module):
            return Verdict(
                name=piece.name,
                outcome="altered",
                target=verdict.target,
                why=rule.why,
                instead=rule.instead,
            )
    return verdict


def _concerns(rule: FieldRule, adapter: Adapter, module: str) -> bool:
    """Returns whether a field alters what a module computes."""
    if rule.fine(adapter.fields.get(rule.field)):
        return False
    if not rule.by_module:
        return True
    keys: Sequence[str] = tuple(fields_of_module(rule, adapter.fields))
    try:
        return pattern_lookup((key, True) for key in keys)(module) is not None
    except ValueError as error:
        raise PeftError(f"{rule.field}: {error}.") from error


def _notes(server: Server, adapter: Adapter, given: int | None) -> tuple[str, ...]:
    """Returns what the server has to be started with."""
    if given is not None or not server.ranks:
        return ()
    top = top_rank(adapter.config)
    enough = [rank for rank in server.ranks if rank >= top]
    return (f"start {server.name} with {server.option} {enough[0]}",) if enough else ()
