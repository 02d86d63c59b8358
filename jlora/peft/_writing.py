"""An adapter's leaves, as the tensors and the config of PEFT."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .._core.tree import widened
from .._io.tensors import NAMES
from .._numerics import is_finite, narrowed, not_finite
from .._tables import listed
from ..errors import PeftError
from ..factors import Axes, Factors, Spec, Trainable
from ..methods import find_init, low_rank_pair
from ..transform.compat import is_staging
from . import layers
from ._expert_writing import relaid
from ._experts import ExpertLayout
from ._fused import joined, whole_of
from ._leaves import on_host
from ._places import UNKNOWN, Cut, Place
from .config import PeftConfig, most_common, patterns
from .layers import RAW, Layer, nested
from .names import NameMap, unnamed

_AS_IS = ("lora", "dora", "mica")  # methods that PEFT has, with the same alpha


@dataclasses.dataclass
class Writing:
    """One save: the tensors by name, and what the config has to say of them.

    Attributes:
      names: what the leaves are called in torch.
      tied: whether an adapted embedding table is the output head too.
      params: the base's leaves by path, as far as they are known.
      dtype: float type to write in; None keeps that of each array.
      on_device: keep JAX arrays, and all that the shapes allow, whatever the numbers.
      layout: how to write experts; None as the names say.

    The others gather what is found; `casts` has the arrays on devices, and their casts.
    """

    names: NameMap
    tied: bool | None
    params: Mapping[str, ArrayLike]
    dtype: DTypeLike | None
    on_device: bool = False
    layout: ExpertLayout | None = None
    rslora: bool = False
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    targets: list[str] = dataclasses.field(default_factory=list)
    raw: dict[Place, Layer] = dataclasses.field(default_factory=dict)
    counts: dict[Place, int] = dataclasses.field(default_factory=dict)
    parameters: list[str] = dataclasses.field(default_factory=list)
    tokens: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    saved: list[str] = dataclasses.field(default_factory=list)
    bias: str = "none"
    tying: bool = False
    conv1d: bool = False
    fused: list[tuple[Place, float, Cut, Layer]] = dataclasses.field(
        default_factory=list
    )
    heads: set[str] = dataclasses.field(default_factory=set)
    packed: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    casts: dict[tuple[str, int], tuple[jax.Array, jax.Array]] = dataclasses.field(
        default_factory=dict
    )

    def write(self, trainable: Trainable) -> PeftConfig:
        """Gathers the tensors of an adapter and returns its config.

        Raises:
          PeftError: lists every leaf without a name in torch or a form in PEFT.
        """
        self.heads = {*trainable.lora, *trainable.full}
        low_rank = {p: f for p, f in trainable.lora.items() if not f.spec.rows}
        specs = [f.spec for f in low_rank.values()]
        as_is = (spec.rslora and spec.method in _AS_IS for spec in specs)
        self.rslora = bool(specs) and all(as_is)
        for path, factors in trainable.lora.items():
            self._factors(path, factors)
        self._join_fused()
        self._relay()
        self._check_order()
        for place, stem in nested(self.raw).items():
            self.tensors[f"{stem}.lora_A.weight"] = self.raw[place].a
            self.tensors[f"{stem}.lora_B.weight"] = self.raw[place].b
            self.parameters.append(place.name)
        self._full(trainable.full)
        self._wrap_packed()
        drops = {spec.dropout for spec in specs}
        invocations = {spec.invocation for spec in specs}
        self.wrong += [
            f"{what} differs between leaves ({sorted(found)}), PEFT has one for all"
            for what, found in (("dropout", drops), ("the invocation", invocations))
            if len(found) > 1
        ]
        others = sorted(p for p, f in low_rank.items() if f.spec.method != "dora")
        dora = len(others) < len(low_rank)
        if dora and others:
            self.wrong.append(
                "PEFT has DoRA for all adapted modules or none, these are without: "
                + listed(others, 5, ", ")
            )
        self._check_casts()
        if self.wrong:
            raise PeftError(
                f"This adapter has no form as PEFT files: {'; '.join(self.wrong)}."
            )
        rank = most_common(self.ranks.values()) if self.ranks else 8
        alpha = most_common(self.alphas.values()) if self.alphas else float(rank)
        return PeftConfig(
            r=rank,
            alpha=alpha,
            rank_pattern=patterns(self.ranks, rank),
            alpha_pattern=patterns(self.alphas, alpha),
            rslora=self.rslora,
            dora=dora,
            dropout=max(drops, default=0.0),
            bias=self.bias,
            targets=tuple(self.targets),
            parameters=tuple(self.parameters),
            saved=tuple(self.saved),
            tokens=tuple(self.tokens.items()),
            tying=self.tying,
            invocation=next(iter(invocations), ()),
            method="mica" if {s.method for s in specs} == {"mica"} else "lora",
            conv1d=self.conv1d,
        )

    def _places(
        self, path: str, shape: tuple[int, ...], op: str = "", axes: Axes | None = None
    ) -> tuple[Place, ...]:
        """Returns the torch tensors that a leaf is; without one, notes why."""
        try:
            places = self.names.places(path, shape, op=op, axes=axes)
        except PeftError as error:
            self.wrong.append(str(error).rstrip("."))
            return ()
        if not places:
            self.wrong.append(unnamed(path, self.names))
        return places

    def _cast(self, path: str, x: ArrayLike) -> np.ndarray:
        array: Any = jnp.asarray(x) if self.on_device else np.asarray(x)
        if array.dtype not in NAMES:
            self.wrong.append(
                f"{path!r} is {array.dtype}, which torch files do not have"
            )
            return np.zeros(array.shape, np.float32)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        if self.on_device:
            out = array.astype(self.dtype or array.dtype)
            if not is_staging(out):
                self.casts[path, len(self.casts)] = array, out
            return out
        return self._cast_on_host(path, array)

    def _cast_on_host(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns an array in the dtype to write; notes numbers that it cannot be."""
        if not is_finite(array):
            self.wrong.append(f"{path!r} holds NaN or infinity")
        if self.dtype is None:
            return array
        try:
            return narrowed(path, array, self.dtype, PeftError)
        except PeftError as error:
            self.wrong.append(str(error).rstrip("."))
            return array

    def _check_casts(self) -> None:
        """Notes what `_cast_on_host` does of arrays on devices, which it waits for."""
        casts = {key: out for key, (_, out) in self.casts.items()}
        for path, n in not_finite(casts):
            self._cast_on_host(path, on_host(self.casts[path, n][0]))

    def _factors(self, path: str, factors: Factors) -> None:
        spec = factors.spec
        init = find_init(spec.init)
        if init is not None and init.changes_base:
            remedy = "save the merged model, its base is in no file of PEFT's"
            if init.base == "residual":
                remedy = "call jlora.rebase first, it gives an adapter for the original"
            self.wrong.append(
                f"{path!r} began with {spec.init!r}, which changed the base weights: "
                f"{remedy}"
            )
        elif spec.rows:
            self._rows(path, factors)
        else:
            self._low_rank(path, factors)

    def _low_rank(self, path: str, factors: Factors) -> None:
        spec = factors.spec
        a, b = (self._cast(path, x) for x in low_rank_pair(factors))
        dora = spec.method == "dora"
        magnitude = self._cast(path, factors.magnitude) if dora else None
        shape = spec.axes.weight_shape(a.shape, b.shape)
        places = self._places(path, shape, spec.op, spec.axes)
        misfits = [r for place in places if (r := layers.misfit(place, spec.axes))]
        if misfits or not places:
            self.wrong += [f"{path!r}: {reason}" for reason in misfits[:1]]
            return
        apart = layers.apart(spec.parts, places)
        if apart:  # the part's own numbers, not those of the whole
            b = layers.spread(spec, shape, self._cast(path, factors.b))
        found: dict[Place, Layer] = {}
        for place in places:
            layer = layers.layer_out(
                place, spec.axes, shape, a, b, magnitude, factors.scale, spec.parts
            )
            if len(places) == 1 or dora or not layers.is_empty(layer):
                found[place] = layer
        if not found:
            self.wrong.append(f"{path!r} is zero in A and in B, so it adapts nothing")
        for place, layer in layers.in_use(found).items():
            if place.cut is not None:
                whole, _ = whole_of(place, shape)
                alpha = self._alpha(spec, spec.rank, apart)
                self.fused.append((whole, alpha, place.cut, layer))
                continue
            experts = layers.dims(place, place.sizes(shape), "e")
            count = math.prod(experts) if place.kind in RAW else 1
            rank = layer.a.shape[0] // count
            self.ranks[place.module] = rank
            self.alphas[place.module] = self._alpha(spec, rank, apart)
            if place.kind in RAW:
                self.counts[place] = count
                self._raw(path, place, layer, spec.dropout)
            else:
                self._layer(path, place, layer)

    def _join_fused(self) -> None:
        """Adds the modules whose weight is several leaves side by side."""
        modules: dict[Place, dict[Cut, tuple[Layer, float]]] = {}
        for place, alpha, cut, layer in self.fused:
            modules.setdefault(place, {})[cut] = layer, alpha
        for place, shares in modules.items():
            first, alpha = next(iter(shares.values()))
            try:
                layer = joined({cut: own for cut, (own, _) in shares.items()})
            except PeftError as error:
                self.wrong.append(f"{place.module}: {error}")
                continue
            rank = layer.a.shape[0]
            if rank != first.a.shape[0]:
                alpha = layer.scale * (math.sqrt(rank) if self.rslora else rank)
            self.ranks[place.module], self.alphas[place.module] = rank, alpha
            self._layer(place.name, place, layer)

    def _alpha(self, spec: Spec, rank: int, apart: bool) -> float:
        """Returns the alpha of a module with `rank` of the leaf's ranks.

        `apart` says that the module is one of the leaf's parts, with their scales.
        """
        own = apart or (rank == spec.rank and spec.parts is None)
        if own and spec.method in _AS_IS and spec.rslora == self.rslora:
            return spec.alpha
        scale = spec.part_scale(rank) if apart else spec.scale
        return scale * (math.sqrt(rank) if self.rslora else rank)

    def _raw(self, path: str, place: Place, layer: Layer, dropout: float) -> None:
        """Adds a bare parameter, whose tensors are named when all are known."""
        self.raw[place] = layer
        if dropout:
            self.wrong.append(f"{path!r}: PEFT has no dropout on a bare parameter")
        if layer.magnitude is not None:
            self.wrong.append(f"{path!r}: PEFT has no DoRA on a bare parameter")

    def _layer(self, path: str, place: Place, layer: Layer) -> None:
        """Adds one module, for a tied embedding the output head as well."""
        module = place.module
        if place.kind == "packed":
            self.packed.append(module)
        a, b = layers.ENDS["embedding" if place.kind == "embedding" else "linear"]
        self.conv1d |= place.kind == "conv1d"
        self.targets.append(module)
        self.tensors |= {f"{module}.{a}": layer.a, f"{module}.{b}": layer.b}
        if layer.magnitude is not None:
            self.tensors[f"{module}.{layers.MAGNITUDE}"] = layer.magnitude
        if place.kind != "embedding" or not self._is_tied(path, place):
            return
        head = str(place.tied).removesuffix(".weight")
        a, b = layers.ENDS["linear"]
        self.tying = True
        self.targets.append(head)
        self.tensors[f"{head}.{a}"] = _contiguous(layer.b.T)
        self.tensors[f"{head}.{b}"] = _contiguous(layer.a.T)
        self.ranks[head], self.alphas[head] = self.ranks[module], self.alphas[module]
        if layer.magnitude is not None:
            self.wrong.append(f"{path!r}: PEFT has no DoRA on a tied head")

    def _relay(self) -> None:
        """Writes the experts in the layout, if there is one, whatever `names` says."""
        if self.layout is None or self.wrong:
            return
        divisor = {m: math.sqrt(r) if self.rslora else r for m, r in self.ranks.items()}
        scales = {m: alpha / divisor[m] for m, alpha in self.alphas.items()}
        try:
            new = relaid(self.tensors, scales, self.raw, self.counts, self.layout)
        except PeftError as error:
            self.wrong.append(str(error).rstrip("."))
            return
        gone = {*new.modules}
        self.targets = [module for module in self.targets if module not in gone]
        for module in new.modules:
            for end in layers.ENDS["linear"]:
                del self.tensors[f"{module}.{end}"]
        for module in [*new.modules, *(place.module for place in new.raw)]:
            del self.ranks[module], self.alphas[module]
        for place in new.raw:
            del self.raw[place]
        self.tensors |= new.made.tensors
        self.parameters += new.made.parameters
        for module, rank in new.made.ranks.items():
            root = math.sqrt(rank) if self.rslora else rank
            self.ranks[module], self.alphas[module] = (
                rank,
                new.made.scales[module] * root,
            )
            if module not in new.made.parameters:
                self.targets.append(module)

    def _check_order(self) -> None:
        """Notes modules of which nothing tells which parameter PEFT wraps first."""
        modules = [place.name.rpartition(".")[0] for place in self.raw]
        self.wrong += [
            f"{place.name} is one of several parameters of a module, and PEFT wraps "
            "them in the order in which it registers them: give names= with an Entry "
            "for each, in that order"
            for place, module in zip(self.raw, modules, strict=True)
            if place.order == UNKNOWN and modules.count(module) > 1
        ]

    def _wrap_packed(self) -> None:
        """Moves the adapter of `out_proj` to where PEFT has it in packed attention.

        PEFT adapts both layers of the module or neither.
        """
        for module in self.packed:
            out = f"{module}.out_proj"
            if out not in self.targets:
                self.wrong.append(
                    f"{module} is packed attention: PEFT adapts {out} too, and the "
                    "adapter does not"
                )
                continue
            self.targets.remove(out)
            rank, alpha = self.ranks.pop(out), self.alphas.pop(out)
            if rank != self.ranks[module]:
                self.wrong.append(
                    f"{module} is packed attention, which has one rank in PEFT: here "
                    f"it has {self.ranks[module]} and, for {out}, {rank}"
                )
            # PEFT adds this update twice.
            b = self.tensors[f"{out}.lora_B.weight"]
            half = np.asarray(alpha / self.alphas[module] / 2, b.dtype)
            self.tensors[f"{out}.lora_B.weight"] = b * half
            own = [name for name in self.tensors if name.startswith(f"{out}.")]
            for name in own:
                inner = name.replace(out, f"{module}.base_layer.out_proj", 1)
                self.tensors[inner] = self.tensors.pop(name)

    def _is_tied(self, path: str, place: Place) -> bool:
        """Returns whether the leaf is the output head too; notes if nothing says so."""
        if place.tied is None or place.tied in self.heads:
            return False
        if self.tied is not None:
            return self.tied
        self.wrong.append(
            f"{path!r} may be the output head too ({place.tied}). Say tied=True if the "
            "model uses it as both, tied=False if not"
        )
        return False

    def _rows(self, path: str, factors: Factors) -> None:
        """Adds the trained rows of a table, which PEFT keeps whole, not as changes."""
        spec = factors.spec
        places = self._places(path, spec.shape, "embedding", spec.axes)
        if not places:
            return
        place, *others = places
        if others or layers.misfit(place, spec.axes):
            self.wrong.append(
                f"{path!r} has trained rows, but is not an embedding in torch"
            )
        elif path not in self.params:
            self.wrong.append(
                f"{path!r} has trained rows: give the frozen parameters as params=, "
                "PEFT keeps rows, not differences"
            )
        else:
            leaf: Any = self.params[path]
            leaf = widened(leaf) if self.on_device else on_host(leaf)
            table = layers.weight_out(place, leaf)
            rows = table[np.array(spec.rows)].astype(np.float32)
            rows = rows + factors.b.astype(np.float32)
            module = place.module
            self.tensors[f"{module}.{layers.TOKENS}"] = self._cast(path, rows)
            self.tokens[module] = spec.rows

    def _full(self, full: Mapping[str, ArrayLike]) -> None:
        """Adds the leaves trained in full, as `modules_to_save` or as biases."""
        modules: dict[str, dict[str, np.ndarray]] = {}
        for path, leaf in full.items():
            array = self._cast(path, leaf)
            for place in self._places(path, array.shape):
                module, _, end = place.name.rpartition(".")
                own = _contiguous(layers.weight_out(place, array))
                modules.setdefault(module, {})[end] = own
                if self._is_tied(path, place):
                    self.tying = True
                    head = str(place.tied).removesuffix(".weight")
                    modules.setdefault(head, {})["weight"] = own
        adapted = set(self.targets)
        for module, leaves in sorted(modules.items()):
            ends = ", ".join(leaves)
            if module in adapted:
                if ends != "bias":
                    self.wrong.append(
                        f"{module} is adapted and its {ends} trained in full, PEFT "
                        "does one or the other"
                    )
                self.bias = "lora_only" if self.bias == "none" else self.bias
            elif ends == "bias":
                self.bias = "all"
            elif not module:
                self.wrong.append(f"{ends} belongs to no module of torch's")
            else:
                self.saved.append(module)
            inner = ".base_layer" if module in adapted else ""
            stem = f"{module}{inner}." if module else ""
            self.tensors |= {f"{stem}{end}": x for end, x in leaves.items()}


def _contiguous(x: Any) -> Any:
    """Returns an array in the order of its axes; on a device it has no other."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x
