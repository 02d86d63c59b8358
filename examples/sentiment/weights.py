"""Hugging Face BERT tensors to the Linen tree of `model.py` and back, with numpy."""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_MODULES = (
    ("embeddings.word_embeddings", "embeddings/word"),
    ("embeddings.position_embeddings", "embeddings/position"),
    ("embeddings.token_type_embeddings", "embeddings/token_type"),
    ("embeddings.LayerNorm", "embeddings/norm"),
    ("encoder.layer.{}.attention.self.query", "encoder/layer_{}/attention/query"),
    ("encoder.layer.{}.attention.self.key", "encoder/layer_{}/attention/key"),
    ("encoder.layer.{}.attention.self.value", "encoder/layer_{}/attention/value"),
    ("encoder.layer.{}.attention.output.dense", "encoder/layer_{}/attention/output"),
    ("encoder.layer.{}.attention.output.LayerNorm", "encoder/layer_{}/attention_norm"),
    ("encoder.layer.{}.intermediate.dense", "encoder/layer_{}/up"),
    ("encoder.layer.{}.output.dense", "encoder/layer_{}/down"),
    ("encoder.layer.{}.output.LayerNorm", "encoder/layer_{}/output_norm"),
    ("classifier", "head"),
)
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


def from_hf(tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns the Linen parameter tree that holds every one of `tensors`.

    Dense kernels are transposed, as PyTorch keeps them `[out, in]`. The pooler and
    the stored position ids have no place in a mean-pooling encoder and are dropped.

    Raises:
      ValueError: if a name is unknown; all unknown names are listed.
    """
    used = {name: value for name, value in tensors.items() if name not in _UNUSED}
    paths = {name: _linen_path(name) for name in used}
    if unknown := sorted(name for name, path in paths.items() if path is None):
        raise ValueError(
            f"{len(unknown)} of {len(tensors)} tensors have no place in this model: "
            f"{', '.join(unknown)}. It reads BERT encoders with absolute positions."
        )
    flat = {paths[name]: _turn(paths[name], value) for name, value in used.items()}
    return unflatten_dict(flat, sep="/")


def to_hf(params: Mapping) -> dict[str, np.ndarray]:
    """Returns `params` under Hugging Face names, the inverse of `from_hf`."""
    flat = flatten_dict(params, sep="/")
    return {
        _hf_name(path): np.ascontiguousarray(_turn(path, np.asarray(value)))
        for path, value in flat.items()
    }


def with_head(encoder: Mapping, template: Mapping, head: Mapping) -> dict:
    """Returns the parameters of the classifier: a loaded `encoder` and a `head`.

    Args:
      encoder: what `from_hf` returned.
      template: the tree of shapes that the model wants, from `jax.eval_shape`.
      head: parameters of the head.

    Raises:
      ValueError: if paths or shapes are not those of `template`; all are listed.
    """
    params = {**encoder, "head": head}
    found = {k: v.shape for k, v in flatten_dict(params, sep="/").items()}
    wanted = {k: v.shape for k, v in flatten_dict(template, sep="/").items()}
    if found != wanted:
        wrong = sorted(
            f"{path}: has {found.get(path)}, wants {wanted.get(path)}"
            for path in found.keys() | wanted.keys()
            if found.get(path) != wanted.get(path)
        )
        raise ValueError("The weights do not fit the model.\n" + "\n".join(wrong))
    return params


def _turn(path: str, value: np.ndarray) -> np.ndarray:
    return value.T if path.endswith("/kernel") else value


def _linen_path(name: str) -> str | None:
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    for hf, linen in _MODULES:
        if match := re.fullmatch(re.escape(hf).replace(r"\{\}", r"(\d+)"), module):
            return f"{linen.format(*match.groups())}/{_linen_leaf(linen, leaf)}"
    return None


def _hf_name(path: str) -> str:
    module, _, leaf = path.rpartition("/")
    for hf, linen in _MODULES:
        if match := re.fullmatch(re.escape(linen).replace(r"\{\}", r"(\d+)"), module):
            suffix = "bias" if leaf == "bias" else "weight"
            return f"{hf.format(*match.groups())}.{suffix}"
    raise ValueError(f"{path!r} is not a parameter of this model.")


def _linen_leaf(module: str, leaf: str) -> str:
    if leaf == "bias":
        return "bias"
    if module.endswith("norm"):
        return "scale"
    if module.startswith("embeddings/"):
        return "embedding"
    return "kernel"
