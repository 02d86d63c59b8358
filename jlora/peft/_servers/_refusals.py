"""What a server refuses of an adapter, whatever its base is."""

from collections.abc import Iterator

from ..config import CONFIG, PeftConfig
from ._adapter import Adapter
from ._report import Verdict
from ._rules import Server


def of_config(server: Server, adapter: Adapter) -> Iterator[Verdict]:
    """Yields what the server refuses of the config and of the files."""
    for field in server.required:
        if field not in adapter.fields:
            yield _refusal(f"{CONFIG}: {field}", f"{server.name} needs it", "write it")
    for rule in server.fields:
        if rule.outcome == "refused" and not rule.fine(adapter.fields.get(rule.field)):
            yield _refusal(f"{CONFIG}: {rule.field}", rule.why, rule.instead)
    top, limit = top_rank(adapter.config), max(server.ranks, default=None)
    if limit is not None and top > limit:
        why = f"rank {top} is above {server.option} {limit}"
        yield _refusal(f"{CONFIG}: r", why, "lower it, with jlora.adapters.truncate")
    if not adapter.one_file and not server.shards:
        why = f"{server.name} reads only adapter_model.safetensors"
        yield _refusal("the tensors", why, "save it without max_shard_bytes")


def _refusal(name: str, why: str, instead: str) -> Verdict:
    return Verdict(name=name, outcome="refused", why=why, instead=instead)


def top_rank(config: PeftConfig) -> int:
    """Returns the largest rank that a config gives."""
    return max([config.r, *(rank for _, rank in config.rank_pattern)])
