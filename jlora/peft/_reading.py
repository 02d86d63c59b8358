"""An adapter's tensors, matched with the leaves of a model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from .._io.shards import Slot
from .._io.torch_models import is_head, is_table
from .._numerics import on_device
from ..errors import PeftError
from ..factors import Factors, Spec, Trainable
from ..methods import find_init
from . import layers
from ._contradictions import (
    ADAPTER_LEAVES,
    biases_missing,
    contradictions,
    is_whole_by,
    rows_misfit,
)
from ._fused import share_of, whole_of
from ._leaves import TargetLeaf, is_same, on_host
from ._places import Place, untied
from .config import FLOATS, PREFIX, PeftConfig, names_module, pattern_lookup
from .layers import RAW, Layer, nested
from .names import Names, unnamed, with_prefix
from .report import LoadReport


@dataclasses.dataclass
class Reading:
    """One load: what is left of the file, and what was found to be wrong.

    Attributes:
      file: the config.
      slots: the tensors by name.
      names: what the leaves are called in torch.
      tied: whether the embedding table is the output head too.
      dtype: type of A and B; None takes the file's.
      twice: modules whose update PEFT adds twice, see `docs/peft_differences.md`.
    """

    file: PeftConfig
    slots: Mapping[str, Slot]
    names: Names
    tied: bool | None
    dtype: DTypeLike | None
    twice: frozenset[str] = frozenset()
    left: dict[str, Slot] = dataclasses.field(default_factory=dict)
    stems: dict[Place, str] = dataclasses.field(default_factory=dict)
    used: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    lora: dict[str, Factors] = dataclasses.field(default_factory=dict)
    full: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    modules: list[str] = dataclasses.field(default_factory=list)
    tables: list[str] = dataclasses.field(default_factory=list)
    fused: dict[str, Layer | None] = dataclasses.field(default_factory=dict)
    fused_slots: dict[str, Slot] = dataclasses.field(default_factory=dict)
    unplaced: list[str] = dataclasses.field(default_factory=list)
    heads: set[str] = dataclasses.field(default_factory=set)
    shared: list[str] = dataclasses.field(default_factory=list)
    saved: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    config: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.wrong += [
            f"{name!r:.200} does not begin with {PREFIX!r}"
            for name in self.slots
            if not name.startswith(PREFIX)
        ]
        self.left = {
            name.removeprefix(PREFIX): slot
            for name, slot in self.slots.items()
            if name.startswith(PREFIX)
        }
        self.rank_of = pattern_lookup(self.file.rank_pattern)
        self.alpha_of = pattern_lookup(self.file.alpha_pattern)

    def read(self, leaves: Sequence[TargetLeaf]) -> None:
        """Reads what the leaves take."""
        planned = {leaf.spec.invocation for leaf in leaves if leaf.spec}
        self.config += [
            f"alora_invocation_tokens is {self.file.invocation}, in the plan {other}"
            for other in planned - {self.file.invocation}
        ]
        named = [(leaf, found) for leaf in leaves if (found := self._places(leaf))]
        if self.file.tying:  # PEFT adapts a tied head without naming it
            tied = {place.tied for _, found in named for place in found if place.tied}
            self.heads = {name.removesuffix(".weight") for name in tied}
        leaves = [leaf for leaf, _ in named]
        own = with_prefix(untied(places for _, places in named), self.names, self.left)
        placed = list(zip(leaves, own, strict=True))
        self.stems = nested(
            place
            for _, found in placed
            for place in found
            if place.kind in RAW
            and any(names_module(t, place.name) for t in self.file.parameters)
        )
        for leaf, found in placed:
            self._read_leaf(leaf, found)
        every = [place for _, found in placed for place in found]
        self.heads |= self.twice
        self.missing += biases_missing(
            self.file, every, modules=self.modules, saved=self.saved
        )
        self.config += contradictions(
            self.file,
            used=self.used,
            modules=self.modules,
            stems=self.stems,
            heads=self.heads,
            tables=self.tables,
            saved=self.saved,
            shared=bool(self.tables or self.shared)
            or any(name.endswith("lora_embedding_A") for name in self.slots),
            every={place.module for place in every},
        )

    def _places(self, leaf: TargetLeaf) -> tuple[Place, ...]:
        """Returns the torch tensors that a leaf is; without one, notes why."""
        wanted = leaf.planned in ("adapted", "full")
        try:
            found = self.names.places(leaf.path, leaf.shape, op=leaf.op, axes=leaf.axes)
        except PeftError as error:
            (self.missing if wanted else self.unplaced).append(str(error).rstrip("."))
            return ()
        if wanted and not found:
            self.missing.append(unnamed(leaf.path, self.names))
        return found

    def _read_leaf(self, leaf: TargetLeaf, places: tuple[Place, ...]) -> None:
        if self._rows(leaf, places):
            return
        found = {p.name: layer for p in places if (layer := self._layer(leaf, p))}
        if found:
            self._factors(leaf, places, found)
        whole = (
            {} if found else {p.name: s for p in places if (s := self._whole(leaf, p))}
        )
        if whole:
            self._full(leaf, places, whole)
        elif not found and leaf.planned in ("adapted", "full"):
            what = "factors for" if leaf.planned == "adapted" else "the whole of"
            self.missing.append(
                f"{what} {leaf.path!r}, in torch {places[0].name}"
                + (f" and {len(places) - 1} more" if len(places) > 1 else "")
            )
        if found and leaf.planned in ("full", "frozen"):
            self.wrong.append(
                f"{leaf.path!r} has factors, the plan has it {leaf.planned}"
            )
        if whole and leaf.planned in ("adapted", "frozen"):
            self.wrong.append(f"{leaf.path!r} is whole, the plan has it {leaf.planned}")

    def _take(self, name: str) -> np.ndarray | None:
        slot = self.left.pop(name, None)
        if slot is None:
            return None
        if slot.dtype not in FLOATS:
            self.wrong.append(f"{name} is {slot.dtype}, not a floating-point type")
            return None
        return self._array(name, slot)

    def _array(self, name: str, slot: Slot) -> np.ndarray | None:
        array = slot.read()
        if slot.dtype in FLOATS and not np.isfinite(array).all():
            self.wrong.append(f"{name} holds NaN or infinity")
            return None
        return array

    def _layer(self, leaf: TargetLeaf, place: Place) -> Layer | None:
        """Returns the adapter of one module, or the leaf's share of it."""
        if place.cut is None:
            return self._read_layer(leaf, place)
        if place.name not in self.fused:
            whole, shape = whole_of(place, leaf.shape)
            all_of = dataclasses.replace(leaf, shape=shape, value=None)
            self.fused[place.name] = self._read_layer(all_of, whole)
        layer = self.fused[place.name]
        return None if layer is None else share_of(layer, place.cut)

    def _read_layer(self, leaf: TargetLeaf, place: Place) -> Layer | None:
        """Returns the adapter of one module, None if the file lacks a part of it."""
        stem = place.module
        if place.kind == "other" or (place.kind in RAW and place not in self.stems):
            return None
        if place.kind in RAW:
            stem = self.stems[place]
        ends = layers.ENDS["embedding" if place.kind == "embedding" else "linear"]
        keys = [f"{stem}.{end}" for end in ends]
        lengths = [f"{stem}.{end}" for end in layers.LENGTHS]
        magnitude = [key for key in lengths if key in self.left]
        if not any(key in self.left for key in (*keys, *magnitude)):
            return None
        absent = [key for key in keys if key not in self.left]
        if self.file.dora and not magnitude:
            absent.append(lengths[0])
        if magnitude and not self.file.dora:
            self.config.append(f"use_dora is false, the file has {magnitude[0]}")
        a, b = (self._take(key) for key in keys)
        m = self._take(magnitude[0]) if magnitude else None
        self.missing += absent
        self.modules.append(place.module)
        self._check_base(leaf, place)
        rank, alpha = self._rank_and_alpha(place.module)
        scale = alpha / (math.sqrt(rank) if self.file.rslora else rank)
        if place.kind == "embedding" and place.tied is not None:
            self._take_head(leaf, place, a, b)
        if a is None or b is None or absent or bool(magnitude) != (m is not None):
            return None
        wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
        layer = Layer(a.astype(wide), b.astype(wide), scale, m)
        reason = layers.check_layer(place, leaf.shape, layer, rank)
        if reason:
            self.wrong.append(f"{place.module}: {reason}")
            return None
        return layer

    def _take_head(
        self, leaf: TargetLeaf, place: Place, a: np.ndarray | None, b: np.ndarray | None
    ) -> None:
        """Reads the factors of a tied head, the table's with their axes swapped."""
        head = str(place.tied).removesuffix(".weight")
        own = None if b is None else b.T, None if a is None else a.T
        ends = layers.ENDS["linear"]
        keys = {f"{head}.{end}": x for end, x in zip(ends, own, strict=True)}
        if self._take_tied(leaf, place, keys, "factors"):
            self.modules.append(head)
        self.left.pop(f"{head}.base_layer.weight", None)

    def _take_tied(
        self,
        leaf: TargetLeaf,
        place: Place,
        own: Mapping[str, np.ndarray | None],
        what: str,
    ) -> bool:
        """Reads the tensors of a tied head, which must be those of the table.

        Args:
          leaf: the table.
          place: where it is in torch.
          own: what each of the head's tensors has to be.
          what: what the table has in the file, "factors".

        Returns:
          Whether the head's tensors are in the file.
        """
        if place.tied is None:
            return False
        tied = leaf.tied if leaf.tied is not None else self.tied
        there = [key in self.left for key in own]
        if tied is None and not any(there):
            self.config.append(
                f"{leaf.path!r} may be the output head too ({place.tied}), and the "
                f"file has {what} for the embedding only. Give the plan, or say "
                "tied=False if the model does not use it as both"
            )
        elif tied and not all(there):
            self.config.append(
                f"{leaf.path!r} is the output head too, but the file has no {what} for "
                f"{place.tied}: PEFT leaves that use of the weight as it was, jlora "
                "has one leaf for both"
            )
        if tied is False or not all(there):
            return False
        found = {key: self._take(key) for key in own}
        self.shared.append(place.tied)
        self.saved.append(place.tied)
        if not all(
            x is not None and y is not None and np.array_equal(x, y)
            for x, y in zip(own.values(), found.values(), strict=True)
        ):
            self.wrong.append(
                f"{place.tied} and {place.name} are tied, their {what} are not"
            )
        return True

    def _rows(self, leaf: TargetLeaf, places: tuple[Place, ...]) -> bool:
        """Reads trained rows of a table, if any; returns whether there are some."""
        place = places[0]
        module = place.module
        key = f"{module}.{layers.TOKENS}"
        if key not in self.left:
            return False
        rows = self._take(key)
        self.tables.append(module)
        tokens = (i for n, i in self.file.tokens if not n or names_module(n, module))
        ids = next(tokens, ())
        if rows is None:
            return True
        reason = rows_misfit(leaf, places, rows, ids)
        if reason:
            self.wrong.append(f"{key}: {reason}")
            return True
        base = layers.weight_out(place, on_host(leaf.value))[list(ids)]
        (b,) = self._placed(leaf, rows.astype(np.float32) - base.astype(np.float32))
        spec = Spec(
            op="embedding",
            axes=leaf.axes or place.axes(),
            rank=len(ids),
            alpha=float(len(ids)),
            method="rows",
            init="zeros",
            shape=leaf.shape,
            rows=ids,
        )
        self.lora[leaf.path] = Factors(None, b, spec)
        return True

    def _placed(self, leaf: TargetLeaf, *arrays: np.ndarray) -> list[jax.Array]:
        dtype = self.dtype or arrays[0].dtype
        return [on_device(leaf.path, x, dtype, PeftError) for x in arrays]

    def _rank_and_alpha(self, module: str) -> tuple[int, float]:
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        hits = {"rank_pattern": rank, "alpha_pattern": alpha}
        self.used |= {(field, hit[0]) for field, hit in hits.items() if hit}
        number = alpha[1] if alpha else self.file.alpha
        doubled = 2 * number if module in self.twice else number
        return rank[1] if rank else self.file.r, doubled

    def _factors(
        self, leaf: TargetLeaf, places: tuple[Place, ...], found: dict[str, Layer]
    ) -> None:
        axes = leaf.axes or places[0].axes()
        misfits = [r for place in places if (r := layers.misfit(place, axes))]
        if misfits:
            self.wrong.append(f"{leaf.path!r}: {misfits[0]}")
            return
        absent = [place.module for place in places if place.name not in found]
        if self.file.dora and absent:
            self.missing.append(f"DoRA of {', '.join(absent)}, parts of {leaf.path!r}")
            return
        parts = self._parts(leaf, places, found)
        if parts is not None:
            self.lora[leaf.path] = parts
            return
        try:
            a, b, m, scale = layers.assemble(places, axes, leaf.shape, found)
        except PeftError as error:
            self.wrong.append(str(error))
            return
        only = next(place for place in places if place.name in found)
        rank, alpha = self._rank_and_alpha(only.module)
        rslora = self.file.rslora
        if a.shape[-1] != rank:  # ranks of several modules beside each other
            rank, rslora = a.shape[-1], False
            alpha = scale * rank
        kind = only.kind if only.kind in ("embedding", "conv") else "linear"
        spec = Spec(
            op=leaf.op if leaf.op in ("linear", "embedding", "conv") else kind,
            axes=axes,
            rank=rank,
            alpha=float(alpha),
            rslora=rslora,
            dropout=self.file.dropout,
            invocation=self.file.invocation,
            method="dora" if m is not None else self.file.method,
        )
        own_a, own_b = self._placed(leaf, a, b)
        magnitude = None
        if m is not None:
            magnitude = on_device(leaf.path, m, np.float32, PeftError)
        spec = self._planned_spec(leaf, spec)
        self.lora[leaf.path] = Factors(own_a, own_b, spec, magnitude)

    def _planned_spec(self, leaf: TargetLeaf, spec: Spec) -> Spec:
        """Returns the plan's own spec if the file's is the same adapter."""
        plan = leaf.spec
        if plan is None:
            return spec
        if (plan.method, plan.rank, plan.scale) != (spec.method, spec.rank, spec.scale):
            self.config.append(
                f"{leaf.path!r} is {spec.method} of rank {spec.rank} and scale "
                f"{spec.scale:g}, in the plan {plan.method} of {plan.rank} and "
                f"{plan.scale:g}"
            )
            return spec
        init = find_init(plan.init)
        if init is not None and init.changes_base:  # the file is for the original base
            return dataclasses.replace(plan, init="kaiming")
        return plan

    def _parts(
        self, leaf: TargetLeaf, places: tuple[Place, ...], found: dict[str, Layer]
    ) -> Factors | None:
        """Returns a fused leaf part by part as the plan has it, None if none fits."""
        spec = leaf.spec
        if spec is None or spec.parts is None:
            return None
        pairs = layers.by_part(spec, places, found)
        if pairs is None or not all(
            layer.a.shape[0] == rank and layer.scale == spec.part_scale(rank)
            for rank, _, layer in pairs
        ):
            return None
        a, b = self._placed(leaf, *layers.compact(spec, leaf.shape, pairs))
        return Factors(a, b, spec)

    def _whole(self, leaf: TargetLeaf, place: Place) -> Slot | None:
        """Returns where the file has the tensor itself, if it is trained."""
        if place.name in self.fused_slots:
            return self.fused_slots[place.name]
        module, _, last = place.name.rpartition(".")
        inner = f"{module}.base_layer.{last}"
        for key in (place.name, inner) if last == "bias" else (place.name,):
            if key not in self.left:
                continue
            slot, table = self.left.pop(key), is_table(module) or is_head(module)
            named = is_whole_by(self.file, place.name)
            if table and not named and is_same(place, leaf.value, slot):
                head = self.left.get(str(place.tied))
                if head and is_same(place, leaf.value, head):
                    self.left.pop(str(place.tied))
                return None  # a copy that PEFT saves beside the adapter
            if not named:
                self.config.append(
                    f"the file has {place.name} whole, but modules_to_save is "
                    f"{list(self.file.saved)!r:.200} and bias {self.file.bias!r}"
                )
            self.saved.append(place.name)
            self.shared += [module] if table else []
            self.fused_slots |= {place.name: slot} if place.cut else {}
            return slot
        return None

    def _check_base(self, leaf: TargetLeaf, place: Place) -> None:
        """Checks that the copy of an adapted table that PEFT saves is the model's."""
        key = f"{place.module}.base_layer.weight"
        slot = self.left.pop(key, None) if place.kind not in RAW else None
        if slot is None:
            return
        wanted = place.shape(leaf.shape)
        if slot.shape != wanted:
            self.wrong.append(
                f"{key} is {slot.shape}, the model's is {wanted}: resize the model's "
                "vocabulary to the adapter's first"
            )
        elif is_same(place, leaf.value, slot) is False:
            self.wrong.append(
                f"{key}, the table that the adapter was trained on, is not the "
                "model's. Put it into the parameters first, with load_base"
            )

    def _full(
        self, leaf: TargetLeaf, places: tuple[Place, ...], whole: dict[str, Slot]
    ) -> None:
        absent = [p.name for p in places if p.name not in whole]
        if absent:
            self.missing.append(f"{', '.join(absent)}, parts of {leaf.path!r}")
            return
        arrays = {}
        for place in places:
            slot = whole[place.name]
            wanted = place.shape(leaf.shape)
            if slot.shape != wanted:
                self.wrong.append(f"{place.name} is {slot.shape}, wanted {wanted}")
                return
            array = self._array(place.name, slot)
            if array is None:
                return
            arrays[place.name] = array
            self._take_tied(leaf, place, {str(place.tied): array}, "numbers")
        floats = [slot.dtype in FLOATS for slot in whole.values()]
        if not all(floats) and jnp.issubdtype(leaf.dtype, jnp.floating):
            self.wrong.append(f"{places[0].name} is not a floating-point array")
            return
        dtype = np.result_type(*(x.dtype for x in arrays.values()))
        if all(floats):
            with jax.numpy_dtype_promotion("standard"):  # whatever the program has set
                dtype = jnp.promote_types(dtype, leaf.dtype)
        out = np.zeros(leaf.shape, dtype)
        for place in places:
            layers.weight_in(place, arrays[place.name].astype(dtype), out)
        self.full[leaf.path] = on_device(leaf.path, out, dtype, PeftError)

    def result(self) -> tuple[Trainable, LoadReport]:
        """Returns the adapter and the report."""
        extra = [
            f"{PREFIX}{name!s:.200}"
            + ("" if name.endswith(ADAPTER_LEAVES) else " (not an adapter's)")
            for name in self.left
        ]
        if extra:  # they may belong to a leaf that could not be named
            self.missing += self.unplaced
        report = LoadReport(
            tuple(dict.fromkeys(self.missing)),
            tuple(extra),
            tuple(dict.fromkeys(self.wrong)),
            tuple(dict.fromkeys(self.config)),
        )
        return Trainable(self.lora, self.full), report
