"""Training steps of a small decoder on meshes of eight devices, and of its floor.

The same layers are written three ways: for meshes with automatic axes, for explicit
axes, and by hand in `shard_map`. Weights are cut over `fsdp` and `tp`, the batch over
`fsdp`, heads and hidden units over `tp`. Each layer gathers its weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jlora

WAYS = ("auto", "explicit", "shard_map")
# Each layer's weights with their layout: fan-out over `tp`, then fan-in over `tp`.
LAYOUT = {
    "q": P("fsdp", "tp", None),
    "k": P("fsdp", "tp", None),
    "v": P("fsdp", "tp", None),
    "o": P("tp", None, "fsdp"),
    "gate": P("fsdp", "tp"),
    "up": P("fsdp", "tp"),
    "down": P("tp", "fsdp"),
}
ROWS = P("fsdp", None, None)
PRODUCTS = {
    "q": "btd,dhk->bthk",
    "k": "btd,dhk->bthk",
    "v": "btd,dhk->bthk",
    "o": "bthk,hkd->btd",
    "gate": "btd,df->btf",
    "up": "btd,df->btf",
    "down": "btf,fd->btd",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its batch, and how it is cut."""

    way: str
    fsdp: int
    tp: int
    scanned: bool = True
    width: int = 256
    layers: int = 4
    rows: int = 16
    length: int = 128
    rank: int = 8
    dtype: str = "float32"

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh, with the axes that the way needs."""
        kind = AxisType.Explicit if self.way == "explicit" else AxisType.Auto
        return jax.make_mesh((self.fsdp, self.tp), ("fsdp", "tp"), (kind,) * 2)

    def params(self) -> dict[str, Any]:
        """Returns the shapes of the weights; scanned layers are stacked."""
        d, h = self.width, 8
        of = dict.fromkeys("qkv", (d, h, d // h)) | {"o": (h, d // h, d)}
        of |= {"gate": (d, 4 * d), "up": (d, 4 * d), "down": (4 * d, d)}
        lead = (self.layers,) if self.scanned else ()
        layer = {
            name: jax.ShapeDtypeStruct((*lead, *shape), self.dtype)
            for name, shape in of.items()
        }
        if self.scanned:
            return layer
        return {f"layer_{i}": dict(layer) for i in range(self.layers)}

    def specs(self) -> dict[str, Any]:
        """Returns the layout of the weights."""
        if self.scanned:
            return {name: P(None, *spec) for name, spec in LAYOUT.items()}
        return {f"layer_{i}": dict(LAYOUT) for i in range(self.layers)}


def _whole(spec: P) -> P:
    """Returns the layout of a weight that is gathered over `fsdp`."""
    return P(*(None if entry == "fsdp" else entry for entry in spec))


def _auto(name: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(PRODUCTS[name], x, w)


def _explicit(name: str, x: jax.Array, w: jax.Array) -> jax.Array:
    w = jax.sharding.reshard(w, _whole(LAYOUT[name]))
    out = ROWS if name in ("o", "down") else P("fsdp", None, "tp")
    return jnp.einsum(PRODUCTS[name], x, w, out_sharding=out)


def _by_hand(name: str, x: jax.Array, w: jax.Array) -> jax.Array:
    axis = tuple(LAYOUT[name]).index("fsdp")
    w = lax.all_gather(w, "fsdp", axis=axis, tiled=True)
    y = jnp.einsum(PRODUCTS[name], x, w)
    return lax.psum(y, "tp") if name in ("o", "down") else y


def _layer(x: jax.Array, w: Any, dot: Callable[..., jax.Array]) -> jax.Array:
    h = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    q, k, v = (dot(name, h, w[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    x = x + dot("o", jnp.einsum("bhts,bshk->bthk", scores, v), w["o"])
    h = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    gated = jax.nn.silu(dot("gate", h, w["gate"])) * dot("up", h, w["up"])
    return x + dot("down", gated, w["down"])


def model(case: Case) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the layers of a case as `fn(params, x)`."""
    dot = {"auto": _auto, "explicit": _explicit, "shard_map": _by_hand}[case.way]
    place = NamedSharding(case.mesh, ROWS)

    def body(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        x = _layer(x, w, dot)
        return (lax.with_sharding_constraint(x, place) if dot is _auto else x), None

    body = jax.checkpoint(body, prevent_cse=not case.scanned)

    def layers(params: Any, x: jax.Array) -> jax.Array:
        if case.scanned:
            return lax.scan(body, x, params)[0]
        for i in range(case.layers):
            x, _ = body(x, params[f"layer_{i}"])
        return x

    if case.way != "shard_map":
        return layers
    return jax.shard_map(
        layers, mesh=case.mesh, in_specs=(case.specs(), ROWS), out_specs=ROWS
    )


def placed(mesh: jax.sharding.Mesh, tree: Any, specs: Any) -> Any:
    """Returns shapes that lie as `specs` say."""
    return jax.tree.map(
        lambda x, spec: x.update(sharding=NamedSharding(mesh, spec)), tree, specs
    )


def lowered(case: Case, name: str, **options: Any) -> jax.stages.Lowered:
    """Returns a step, lowered on shapes.

    Args:
      case: the model.
      name: `"floor"` is the gradient of a bias on the input, `"full"` that of all
        weights, `"jlora"` that of A and B.
      options: for `apply_lora`.
    """
    mesh, fn = case.mesh, model(case)
    params = case.params()
    x = jax.ShapeDtypeStruct((case.rows, case.length, case.width), case.dtype)
    with jax.set_mesh(mesh):
        x = placed(mesh, x, ROWS)
        frozen = placed(mesh, params, case.specs())
        if name == "jlora":
            config = jlora.LoraConfig(rank=case.rank)
            plan = jlora.plan(fn, frozen, x, config=config)
            _, trained = jax.eval_shape(
                lambda key, params: jlora.split(key, params, plan),
                jax.random.key(0),
                params,
            )
            own = jlora.shardings(
                jax.tree.map(lambda s: NamedSharding(mesh, s), case.specs()), trained
            )
            trained = jax.tree.map(lambda x, s: x.update(sharding=s), trained, own)
            run = jlora.apply_lora(fn, on_merge="error", **options)
        elif name == "floor":
            bias = jax.ShapeDtypeStruct((1, 1, case.width), case.dtype)
            trained = placed(mesh, bias, P())

            def run(frozen: Any, bias: jax.Array, x: jax.Array) -> jax.Array:
                return fn(frozen, x + bias)
        else:
            trained = frozen

            def run(_: Any, params: Any, x: jax.Array) -> jax.Array:
                return fn(params, x)

        def loss(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
            return jnp.mean(run(frozen, trained, x).astype(jnp.float32) ** 2)

        own = jax.tree.map(lambda x: x.sharding, trained)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, own))
        return step.lower(trained, frozen, x)
