"""A plan as JSON values, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import LoraConfig
from ..factors import Spec, tuples
from ..methods import find_init, method_of
from ..transform.discover import Use
from .plan import Plan
from .row import Row


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as JSON values.

    Raises:
      ConfigError: if the config's `targets` is a predicate, which has no JSON form.
    """
    rows = [dataclasses.asdict(row) for row in plan.leaves]
    for row, fields in zip(plan.leaves, rows, strict=True):
        fields["spec"] = None if row.spec is None else row.spec.to_dict()
        del fields["init"]  # its name is in the spec
    return {"config": plan.config.to_json(), "leaves": rows}


def plan_from_dict(fields: Mapping[str, Any]) -> Plan:
    """Returns the plan that `plan_to_dict` described, equal and of equal hash."""
    return Plan(
        LoraConfig.from_json(fields["config"]),
        tuple(_row(row) for row in fields["leaves"]),
    )


def _row(fields: Mapping[str, Any]) -> Row:
    uses = tuple(Use(**tuples(use)) for use in fields["uses"])
    spec = None if fields["spec"] is None else Spec.from_dict(fields["spec"])
    init = None
    if spec is not None and method_of(spec).init is None:
        init = find_init(spec.init)
    read = {"uses": uses, "spec": spec, "shape": tuple(fields["shape"]), "init": init}
    return Row(**{**fields, **read})
