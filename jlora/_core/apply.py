"""`apply_lora`: the function with its low-rank terms on the activation path."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import check_function, check_key
from .._plan.weight import weight_of
from .._tables import alike, folded, listed
from ..errors import ConfigError, MergeError, MergeWarning
from ..factors import FORMS, Form, PyTree, Trainable
from ..methods import method_of
from ..quantised import has_quantized, is_quantized
from ..transform.compat import Equation
from ..transform.rewrite import rewrite, why_merged, why_widened
from ..transform.stage import Staged, stage
from ..transform.values import leaf
from .tree import combine, flatten_frozen

OnMerge = Literal["allow", "warn", "error"]
Args = ParamSpec("Args")
Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


class LoraFunction(Protocol[Args, Out_co]):
    """What `apply_lora` returns, for type checkers.

    A signature cannot say "the arguments of `fn` and `lora_key` too", so with a
    `lora_key` or a `lora_gate` the arguments are not checked.
    """

    @overload
    def __call__(
        self,
        frozen: PyTree,
        trainable: Trainable,
        /,
        *args: Args.args,
        **kwargs: Args.kwargs,
    ) -> Out_co: ...
    @overload
    def __call__(
        self,
        frozen: PyTree,
        trainable: Trainable,
        /,
        *args: Any,
        lora_key: jax.Array | None,
        lora_gate: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Out_co: ...
    @overload
    def __call__(
        self,
        frozen: PyTree,
        trainable: Trainable,
        /,
        *args: Any,
        lora_gate: ArrayLike | None,
        **kwargs: Any,
    ) -> Out_co: ...


def apply_lora(
    fn: Callable[Concatenate[PyTree, Args], Out],
    *,
    on_merge: OnMerge = "warn",
    form: Form = "auto",
) -> LoraFunction[Args, Out]:
    """Returns `lora_fn(frozen, trainable, *args, lora_key=, lora_gate=, **kwargs)`.

    `lora_fn` computes `fn(merge(frozen, trainable), *args, **kwargs)`, with a low-rank
    term at every place where an adapted weight is used. As a rule it adds
    `scale * (x a) b` to the activations. Where many tokens meet a weight, `x` is
    multiplied by a temporary `w + scale * a b` instead, which moves fewer bytes; see
    `form`. The gradient never makes an array of the weight's size. `lora_fn` is pure
    and composes with `jit`, `grad`, `vmap`, `scan`, `checkpoint` and shardings. Wrap it
    in `jax.jit`. With an empty `trainable` it calls `fn` as it is. A policy of
    `jax.checkpoint`, in `fn` or around `lora_fn`, saves an adapted product where it
    saves the frozen one.

    `fn` is staged at each call, so it sees tracers: also without `jit`, and also under
    `jax.disable_jit()`. To look at values inside, use `jax.debug.print` or
    `jax.debug.breakpoint`, or call `fn(jlora.merge(frozen, trainable), ...)`, which is
    plain JAX.

    Args:
      fn: `fn(params, *args, **kwargs)`, any pytrees in and out: a Linen `apply`, a
        function around `nnx.merge`, plain JAX.
      on_merge: what to do where the factored route does not exist and the weight is
        merged on the fly, which is correct but slower: `"warn"` once for each trace,
        `"allow"` it, or raise an `"error"`.
      form: how the value of a matrix product is computed, where no `Rule` says it.
        `"factored"` adds the low-rank term to the activations. `"merged"` adds it to a
        temporary weight, which moves fewer bytes where many tokens meet a small weight.
        `"auto"` chooses by shapes, dtype and platform. Over several devices it is
        factored: a sum would be gathered beside the weight. Gradients are factored with
        all three. Where the dtypes of activation, weight and result differ, under
        explicit axes, inside `shard_map` and over codes, the value is factored in any
        case.

    Returns:
      The adapted function. `lora_key` is a PRNG key that turns dropout on; each use of
      a weight and each loop step draws its own mask. So does each shard of an
      activation in a `shard_map`; devices that hold the same one draw the same. Where
      `lora_fn` runs in a `pmap`, or a `shard_map` with `check_vma=False`, nothing tells
      what is sharded: fold `jax.lax.axis_index` into the key yourself. A weight that is
      merged on the fly has no input to drop.

      `lora_gate` is an array that multiplies the low-rank term: booleans, or numbers of
      a float dtype. Its axes are the leading axes of the activations in `fn`, such as
      `[batch, tokens]`; True is for all tokens. Where it is zero, the operations of the
      base give their own bits. An activated adapter (`LoraConfig.invocation`) needs a
      gate, see `adapters.invocation_gate`.

    Raises:
      ConfigError: if `fn` is a module or not a function, or `on_merge` or `form` is
        not one of the above; (when called) if `lora_key` is not a PRNG key, if an
        activated adapter has no `lora_gate`, or if the gate does not reach a weight: it
        meets an activation with other leading axes, a convolution or a ragged product,
        is merged on the fly, rescaled (DoRA) or trained in full.
      TreeError: (when called) if frozen and trainable do not fit together.
      MergeError: (when called) if a weight is merged and `on_merge="error"`.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> x = jnp.ones((1, 4))
      >>> config = jlora.LoraConfig(rank=2, targets="w")
      >>> plan = jlora.plan(fn, params, x, config=config)
      >>> frozen, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> lora_fn = jax.jit(jlora.apply_lora(fn))
      >>> bool((lora_fn(frozen, trainable, x) == fn(params, x)).all())
      True

    References:
      Hu et al., 2021, LoRA, https://arxiv.org/abs/2106.09685
    """
    check_function("apply_lora", fn)
    if on_merge not in ("allow", "warn", "error"):
        raise ConfigError(
            f"on_merge must be 'allow', 'warn' or 'error', got {on_merge!r}."
        )
    if form not in FORMS:
        raise ConfigError(f"form must be one of {FORMS}, got {form!r}.")

    @functools.wraps(fn)
    def lora_fn(
        frozen: PyTree,
        trainable: Trainable,
        /,
        *args: Any,
        lora_key: jax.Array | None = None,
        lora_gate: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Out:
        params = combine(frozen, trainable)
        gate = _gate(lora_gate, trainable)
        if lora_key is not None:
            check_key("lora_key", lora_key)
        if not trainable.lora and not has_quantized((params, args, kwargs)):
            return fn(params, *args, **kwargs)
        staged = stage(fn, params, args, kwargs)
        values = _values(staged, frozen, trainable)
        merges: dict[str, str] = {}
        widenings: dict[str, str] = {}

        def merged(path: str, eqn: Equation | None) -> None:
            merges.setdefault(path, why_merged(eqn))

        def widened(path: str, eqn: Equation | None) -> None:
            widenings.setdefault(path, why_widened(eqn))

        hooks = {"merged": merged, "widened": widened}
        outs = rewrite(staged.code, values, key=lora_key, gate=gate, form=form, **hooks)
        _tell(merges, widenings, on_merge)
        return staged.rebuild(outs)

    # `functools.wraps` copies the signature of `fn`, which differs from this one.
    del lora_fn.__wrapped__
    return lora_fn


def _values(staged: Staged, frozen: PyTree, trainable: Trainable) -> list[Any]:
    """Returns a staged function's inputs, adapted and quantised ones as weights."""
    values = [
        leaf(f"argument {i}", x) if is_quantized(x) else x
        for i, x in enumerate(staged.inputs)
    ]
    paths = list(flatten_frozen(frozen)[0])
    for path, slot in zip(paths, staged.param_slots, strict=True):
        if slot is None:
            continue
        w = staged.inputs[slot]
        if path in trainable.lora:
            values[slot] = weight_of(path, w, trainable.lora[path])
        elif is_quantized(w):
            values[slot] = leaf(path, w)
    return values


def _gate(gate: ArrayLike | None, trainable: Trainable) -> jax.Array | None:
    """Returns the gate as an array, or raises if the adapter has none, or needs one."""
    if gate is None:
        activated = [p for p, f in trainable.lora.items() if f.spec.invocation]
        if activated:
            raise ConfigError(
                f"{listed(map(repr, activated), 3, ', ')} are activated LoRA, which "
                "acts only from its invocation on: give lora_gate=, from "
                "jlora.adapters.invocation_gate(trainable, tokens), or lora_gate=True "
                "if all tokens come after it."
            )
        return None
    if gate is True:
        return None
    found = jnp.asarray(gate)
    if found.dtype != bool and not jnp.issubdtype(found.dtype, jnp.floating):
        raise ConfigError(
            f"lora_gate must hold booleans or floating-point numbers, got "
            f"{found.dtype}."
        )
    whole = [f"{path!r} is trained in full" for path in trainable.full]
    whole += [
        f"{path!r} is {f.spec.method!r}, which rescales the whole weight"
        for path, f in trainable.lora.items()
        if method_of(f.spec).gain is not None
    ]
    if whole:
        raise ConfigError(f"lora_gate cannot act on these leaves: {listed(whole)}.")
    return found


def _tell(
    merges: Mapping[str, str], widenings: Mapping[str, str], on_merge: OnMerge
) -> None:
    """Warns of slow routes, or raises, as `on_merge` says."""
    if on_merge == "allow" or not (merges or widenings):
        return
    raises = on_merge == "error"
    texts = []
    if merges:
        texts.append(
            ("No factored route for these weights:" if raises else _MERGED)
            + _lines(merges)
        )
    if widenings:
        texts.append(_WIDENED + _lines(widenings))
    if raises:
        raise MergeError(
            "\n".join(texts) + "\nLeave them out with exclude= (of a quantised base: "
            "with targets= of jlora.quantize), or permit it with "
            'on_merge="allow".'
        )
    warnings.warn(
        "\n".join(texts) + '\nSilence this with on_merge="allow".',
        MergeWarning,
        stacklevel=3,
    )


_MERGED = (
    "These weights are merged on the fly, which is correct but slower than the "
    "factored route:"
)
_WIDENED = (
    "These quantised weights are widened whole, which is correct but takes the memory "
    "of the dense weight:"
)


def _lines(why: Mapping[str, str]) -> str:
    found = [f"{folded(paths)}: {text}" for paths, text in alike(why.items())]
    return "\n  " + listed(found, 20, "\n  ")
