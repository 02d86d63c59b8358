"""A tiny model, a tokenizer of bytes and chat templates for `examples/chat`."""

import json
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jlora
from examples.chat import hub, model

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3: only the last answer has its thought, which is empty if there was none.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek-R1: whoever asks opens the thought, and a conversation has none.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user comes first') }}"
    "{% endif %}" + CHATML
)


def tokenizer(template: str | None = CHATML) -> Any:
    """Returns a fast tokenizer of single bytes and `SPECIAL`."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def hub_directory(folder: Path, **changes: Any) -> Path:
    """Writes a tiny random Llama as a directory of the Hub, and returns it."""
    tok = tokenizer()
    tok.save_pretrained(folder)
    ends = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    found = {**CONFIG, "vocab_size": len(tok), **ends, **changes}
    config = model.DecoderConfig.from_hub(found)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), config)
    jlora.peft.save_base(folder, params, names=hub.names(config), config=found)
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def conversations(path: Path, count: int = 40) -> Path:
    """Writes short conversations as JSON lines, and returns the file."""
    lines = [
        {"prompt": f"say {i % 5}", "completion": "yes" * (i % 5 + 1)}
        for i in range(count)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
