"""What a server does with each tensor of an adapter, and how that is shown."""

import dataclasses
import re
from typing import Literal

from ..._tables import alike, folded, listed, pattern_of, table

Outcome = Literal["applied", "copy", "altered", "dropped", "refused"]
FINE = ("applied", "copy")
_AB = re.compile(r"lora_(embedding_)?[AB]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a server does with one tensor of an adapter, or with a field of its config.

    Attributes:
      name: the tensor, or `adapter_config.json: field`.
      outcome: `"applied"`; `"copy"`, left out without a loss, since it is the base's;
        `"altered"`, applied, but not as it was trained; `"dropped"`, ignored without an
        error; `"refused"`, an error.
      target: what it is applied to, as the server calls it.
      why: the reason, empty where all is well.
      instead: what to write or do instead.

    Examples:
      >>> verdict = Verdict(name="lm_head.weight", outcome="dropped", why="not read")
      >>> verdict.fine
      False
    """

    name: str
    outcome: Outcome
    target: str = ""
    why: str = ""
    instead: str = ""

    @property
    def fine(self) -> bool:
        """Whether nothing is lost."""
        return self.outcome in FINE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerReport:
    """What a server does with an adapter. Printing it shows the table.

    Attributes:
      server: the server's name.
      version: the version whose source the rules were read from.
      verdicts: one for each tensor, in the file's order, and one before them for each
        field of the config that matters.
      notes: what the server has to be started with.

    Examples:
      >>> verdict = Verdict(name="lm_head.weight", outcome="dropped", why="not read")
      >>> report = ServerReport(server="vllm", version="0.33.0", verdicts=(verdict,))
      >>> report.fine
      False
      >>> print(report)
      tensor          outcome  why
      ──────────────  ───────  ────────
      lm_head.weight  dropped  not read
      vllm 0.33.0: 1 dropped
    """

    server: str
    version: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def fine(self) -> bool:
        """Whether every tensor is applied as it was trained."""
        return all(verdict.fine for verdict in self.verdicts)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[Verdict]] = {}
        for v in self.verdicts:  # A and B of a module share a line
            said = v.outcome, v.target, v.why, v.instead
            groups.setdefault((_AB.sub(r"lora_\1*", v.name), *said), []).append(v)
        named = [
            (
                _AB.sub(r"lora_\1{A,B}", own[0].name) if len(own) > 1 else own[0].name,
                own,
            )
            for own in groups.values()
        ]
        targets = {name: own[0].target for name, own in named}
        rest = [
            (name, (o.outcome, o.why, o.instead, pattern_of(o.target)))
            for name, (o, *_) in named
        ]
        lines = [
            (folded(names), outcome, _folded([targets[n] for n in names]), why, instead)
            for names, (outcome, why, instead, _) in alike(rest)
        ]
        head = ("tensor", "outcome", "applied to", "why", "instead")
        used = [i for i in range(5) if i < 2 or any(line[i] for line in lines)]
        shown = table(
            [head[i] for i in used], [[line[i] for i in used] for line in lines]
        )
        return "\n".join([shown, self.summary(), *self.notes])

    def summary(self) -> str:
        """Returns how many tensors have which outcome, in a line.

        Examples:
          >>> verdict = Verdict(name="q_proj.lora_A.weight", outcome="applied")
          >>> verdicts = (verdict, verdict)
          >>> ServerReport(server="peft", version="0.21.2", verdicts=verdicts).summary()
          'peft 0.21.2: 2 applied'
        """
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
        told = listed([f"{n} {name}" for name, n in counts.items()], separator=", ")
        return f"{self.server} {self.version}: {told or 'no tensors'}"


def _folded(targets: list[str]) -> str:
    """Returns one text for targets that differ only in numbers, without their count."""
    return folded(targets).partition(" (×")[0]
