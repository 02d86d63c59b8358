"""What does not fit between a file and a model, in words."""

import dataclasses

from ..errors import PeftError


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a directory had that does not fit; see `load_partial`.

    It is false if nothing was found.

    Attributes:
      missing: what was wanted and is not in the file.
      extra: tensors in the file that no leaf of the model takes.
      wrong: tensors of another shape or type, and values that are not finite.
      config: fields of the config that jlora lacks, or that contradict the tensors.

    Examples:
      >>> found = LoadReport(missing=("q_proj.lora_A.weight",))
      >>> len(found), bool(LoadReport())
      (1, False)
      >>> print(found)
        missing: q_proj.lora_A.weight
    """

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    config: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(getattr(self, f.name)) for f in dataclasses.fields(self))

    def __str__(self) -> str:
        lines = [
            f"  {field.name}: {text}"
            for field in dataclasses.fields(self)
            for text in getattr(self, field.name)
        ]
        more = len(lines) - 200
        return "\n".join(lines[:200] + ([f"  and {more} more"] if more > 0 else []))


def check(report: LoadReport, what: str, partial: str | None = None) -> None:
    """Raises a PeftError that lists the findings, if there are any.

    `what` says what was read, `partial` which function takes what fits, if one does.
    """
    if report:
        then = "" if partial is None else f"\njlora.peft.{partial} takes what fits."
        raise PeftError(f"{what} does not fit, {len(report)} findings:\n{report}{then}")
