"""The models of jlora's own examples."""

from ..names import Entry, NameMap
from ._rules import dense, norm

_SENTIMENT_LAYER = "encoder/layer_{i}", "[bert.]encoder.layer.{i}"

#: The BERT encoder of `examples/sentiment`, Linen.
SENTIMENT = NameMap(
    (
        *(
            Entry(f"embeddings/{flax}/embedding", f"[bert.]embeddings.{torch}.weight")
            for flax, torch in (
                ("word", "word_embeddings"),
                ("position", "position_embeddings"),
                ("token_type", "token_type_embeddings"),
            )
        ),
        *norm("embeddings/norm", "[bert.]embeddings.LayerNorm"),
        *(
            entry
            for flax, torch in (
                ("attention/query", "attention.self.query"),
                ("attention/key", "attention.self.key"),
                ("attention/value", "attention.self.value"),
                ("attention/output", "attention.output.dense"),
                ("up", "intermediate.dense"),
                ("down", "output.dense"),
            )
            for entry in dense(
                f"{_SENTIMENT_LAYER[0]}/{flax}", f"{_SENTIMENT_LAYER[1]}.{torch}"
            )
        ),
        *norm(
            f"{_SENTIMENT_LAYER[0]}/attention_norm",
            f"{_SENTIMENT_LAYER[1]}.attention.output.LayerNorm",
        ),
        *norm(
            f"{_SENTIMENT_LAYER[0]}/output_norm",
            f"{_SENTIMENT_LAYER[1]}.output.LayerNorm",
        ),
        *dense("head", "classifier"),
    ),
    prefix="bert.",
    ignore=(
        "[bert.]embeddings.position_ids",
        "[bert.]pooler.dense.{leaf:weight,bias}",
    ),
)
