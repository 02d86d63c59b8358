"""What SGLang's own code does with the adapters of `server_cases.py`.

    python tests/golden/check_sglang.py SGLANG      # torch, safetensors

SGLANG is the folder where a wheel of SGLang is unpacked (`pip download --no-deps
sglang`, then `unzip`). Real is all that reads an adapter: `LoRAManager` from
`init_state` on, `LoRAConfig`, `LoRAAdapter`, the layers' slicing and `LoRAMemoryPool`,
up to the buffers that the kernels read. Only the base's modules are made here, with
SGLang's names. Each element of an adapter is a number of its own: a tensor is used if
it lies whole where its module reads it. The result is `servers.sglang.json`, with which
`tests/peft/test_servers.py` compares `jlora.peft.validate`.

An adapter is loaded as `--lora-paths` does, with nothing said of modules and ranks.
"""

import json
import logging
import pathlib
import re
import sys
import tempfile
import types

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.golden import check_vllm, make_servers, server_cases
from tests.golden.server_cases import P

TABLE = pathlib.Path(__file__).parent / "servers.sglang.json"
REAL = {
    f"sglang.srt.lora.{name}"
    for name in (
        "eviction_policy", "layers", "lora", "lora_config", "lora_manager", "mem_pool",
        "utils",
    )
} | {"sglang.srt.layers.utils.common"}  # fmt: skip
PARTS = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Names that transformers' config classes have beside those in the file.
CONFIG = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
FIRST = 4096  # the first number of an adapter: each element has one of its own


class Loose:
    """Has every attribute, each another one, and answers False to each call."""

    def __init__(self, **known):
        self.__dict__ |= known

    def __getattr__(self, name):
        return Loose()

    def __call__(self, *args, **kwargs):
        return False

    def __bool__(self):
        return False


def set_up(root: pathlib.Path) -> None:
    """Makes the modules of SGLang importable."""
    import torch
    from torch import nn

    stubs = ("sglang", "triton", "msgspec", "huggingface_hub")
    sys.meta_path.insert(0, check_vllm.Stubs(root, REAL, stubs))
    import sglang.srt.distributed.utils as groups
    import sglang.srt.environ as environ
    import sglang.srt.layers.linear as linear
    import sglang.srt.layers.moe as moe
    import sglang.srt.layers.moe.fused_moe_triton.layer as fused
    import sglang.srt.layers.moe.moe_runner.runner as runner
    import sglang.srt.layers.moe.utils as moe_utils
    import sglang.srt.layers.utils as utils
    import sglang.srt.layers.vocab_parallel_embedding as vocab
    import sglang.srt.managers.io_struct as io_struct
    import sglang.srt.model_loader.loader as loader
    import sglang.srt.runtime_context as context
    import sglang.srt.utils as srt
    from sglang.srt.layers.utils.common import get_layer_id

    def base(name, parent=nn.Module):
        return type(name, (parent,), {"tp_size": 1, "tp_group": None, "bias": None})

    linear.LinearBase = base("LinearBase")
    for name in ("ColumnParallelLinear", "ReplicatedLinear", "RowParallelLinear"):
        setattr(linear, name, base(name, linear.LinearBase))
    for name in ("MergedColumnParallelLinear", "QKVParallelLinear"):
        setattr(linear, name, base(name, linear.ColumnParallelLinear))
    vocab.VocabParallelEmbedding = base("VocabParallelEmbedding")
    vocab.ParallelLMHead = base("ParallelLMHead", vocab.VocabParallelEmbedding)
    vocab.ParallelLMHead.__init__ = _head
    fused.FusedMoE = base("FusedMoE")
    environ.envs = Loose()
    utils.get_layer_id = get_layer_id
    triton = Loose(is_triton=lambda: True)
    moe.MoeRunnerBackend = Loose(TRITON=triton)
    runner.MoeRunner = Loose()
    moe_utils.get_moe_runner_backend = lambda: Loose(is_auto=lambda: True)
    sizes = {"tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "moe_ep_size": 1}
    sizes |= {"moe_ep_rank": 0, "moe_tp_size": 1, "moe_tp_rank": 0}
    parallel = Loose(**sizes, pp_group=types.SimpleNamespace(is_last_rank=True))
    context.get_parallel = lambda: parallel
    io_struct.LoRAUpdateOutput = types.SimpleNamespace
    srt.is_pin_memory_available = lambda: False
    srt.replace_submodule = _replace
    groups.get_group_rank_size = lambda group: (0, 1)
    loader.DefaultModelLoader = Loader

    made = torch.tensor
    torch.tensor = lambda *a, pin_memory=False, **options: made(*a, **options)
    torch.Tensor.pin_memory = lambda self: self


def _head(self, num_embeddings, embedding_dim, **_):
    super(type(self), self).__init__()
    _sizes(self, num_embeddings, embedding_dim)


def _sizes(module, rows: int, columns: int) -> None:
    import torch

    module.embedding_dim, module.org_vocab_size = columns, rows
    module.num_embeddings = rows
    module.weight = torch.nn.Parameter(torch.zeros(rows, columns))


def _replace(model, name, new):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return new


class Loader:
    """Reads files as `DefaultModelLoader` does."""

    Source = staticmethod(lambda path, **_: path)

    def __init__(self, config):
        pass

    def _get_weights_iterator(self, path):
        from safetensors.torch import load_file

        for file in sorted(pathlib.Path(path).glob("*.safetensors")):
            yield from load_file(file).items()


class Sglang:
    """SGLang with one model."""

    def __init__(self, pattern: str, base: pathlib.Path):
        from safetensors.torch import load_file

        self.pattern = re.compile(pattern)
        fields = json.loads((base / "config.json").read_text())
        own = {CONFIG.get(key, key): value for key, value in fields.items()}
        some = {"num_hidden_layers": 2, "num_attention_heads": 1}
        some |= {"num_key_value_heads": 1, "intermediate_size": server_cases.INNER}
        self.tensors = load_file(base / "model.safetensors")
        if any("experts" in name for name in self.tensors):
            own["num_experts"] = 3
        self.config = types.SimpleNamespace(**(some | own))
        self.gpt_oss = own["architectures"] == ["GptOssForCausalLM"]

    def model(self):
        """The model's modules, as SGLang calls them and gives them their sizes."""
        import torch

        model = torch.nn.Module()
        model.config = self.config
        if self.pattern.pattern:
            model.should_apply_lora = lambda name: bool(self.pattern.match(name))
        for name, tensor in self.tensors.items():
            if tensor.ndim < 2:
                continue
            module = name.removesuffix(".weight")
            parent, _, last = module.rpartition(".")
            if ".experts" in name:
                module = name[: name.index(".experts") + 8]
            elif "vision" not in name and "visual" not in name:
                module = f"{parent}.{PARTS.get(last, last)}".strip(".")
            self._add(model, module, last, tensor)
        if getattr(self.config, "tie_word_embeddings", False):
            body = getattr(model, "model", None)
            model.lm_head = getattr(body, "embed_tokens", None)
        return model

    def _add(self, model, name: str, part: str, tensor) -> None:
        import torch

        place = model
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        if not hasattr(place, last):
            module = self._made(last)
            if module is None:
                return
            place.add_module(last, module)
            module.sizes = {}
        module = getattr(place, last)
        rows, columns = (*tensor.shape, 1)[:2]
        if last in ("embed_tokens", "lm_head"):
            _sizes(module, rows, columns)
        elif last != "experts":
            module.sizes[part] = rows
            self._linear(module, columns)

    def _made(self, last: str):
        from sglang.srt.layers import linear, vocab_parallel_embedding as vocab
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        if last == "embed_tokens":
            return vocab.VocabParallelEmbedding()
        if last == "lm_head":
            return vocab.ParallelLMHead(1, 1)
        if last == "experts":
            module = FusedMoE()
            alpha = 1.702 if self.gpt_oss else None
            module.moe_runner_config = Loose(is_gated=True, gemm1_alpha=alpha)
            module.is_shared_fused_moe, module.runner = False, None
            module.moe_tp_size, module.moe_tp_rank = 1, 0
            module.intermediate_size_per_partition = server_cases.INNER
            module.quant_method = module.dispatcher = Loose()
            module.num_local_experts = 3
            module.should_fuse_routed_scaling_factor_in_topk = False
            return module
        kinds = {
            "qkv_proj": "QKVParallelLinear",
            "gate_up_proj": "MergedColumnParallelLinear",
            "o_proj": "RowParallelLinear",
            "down_proj": "RowParallelLinear",
        }
        return getattr(linear, kinds.get(last, "ReplicatedLinear"))()

    def _linear(self, module, columns: int) -> None:
        import torch

        sizes, kind = [*module.sizes.values()], type(module).__name__
        if kind == "QKVParallelLinear":
            heads = self.config.num_attention_heads
            kv_heads = self.config.num_key_value_heads
            one = sum(sizes) // (heads + 2 * kv_heads)
            module.head_size, module.num_kv_head_replicas = one, 1
            module.total_num_heads, module.total_num_kv_heads = heads, kv_heads
            module.q_proj_shard_size = heads * one
            module.kv_proj_shard_size = kv_heads * one
            module.kv_tp_group = None
            sizes = [heads * one, kv_heads * one, kv_heads * one]
        elif kind == "MergedColumnParallelLinear" and len(sizes) == 1:
            sizes = [sizes[0] // 2] * 2
        if kind == "RowParallelLinear":
            module.input_size_per_partition = columns
        else:
            module.output_sizes = module.output_partition_sizes = sizes
        module.output_size = sum(sizes)
        module.weight = torch.nn.Parameter(torch.zeros(sum(sizes), columns))

    def manager(self, folder: pathlib.Path):
        """`LoRAManager` of a server that was started with the adapter."""
        import torch
        from sglang.srt.lora.lora_manager import LoRAManager

        m = object.__new__(LoRAManager)
        m.base_model, m.base_hf_config = self.model(), self.config
        m.max_loras_per_batch, m.load_config = 1, None
        m.dtype, m.device = torch.float32, torch.device("cpu")
        m.attn_tp_size, m.lora_added_tokens_size = 1, None
        m.enable_lora_overlap_loading = m.attn_dp_enabled = False
        m.pending_lora_load_events, m.eviction_policy = {}, "lru"
        m._experts_shared_outer_override = None
        m.moe_lora_runner_backend = Loose()
        m.lora_use_virtual_experts = m.lora_strict_loading = False
        m.speculative_algorithm = None
        m.lora_backend = types.SimpleNamespace(
            name="triton", validate_lora_targets=lambda **_: None
        )
        ref = types.SimpleNamespace(
            lora_id="1", lora_name="own", lora_path=str(folder), pinned=False
        )
        m.init_state(lora_paths=[ref])
        m.fetch_new_loras({"1"})
        return m

    def says(self, folder: pathlib.Path) -> str | list[str]:
        """What SGLang does: its error, or for each tensor what becomes of it."""
        import torch
        from safetensors.torch import load_file, save_file

        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        start = FIRST
        for name in sorted(tensors):
            shape = tensors[name].shape
            end = start + shape.numel()
            tensors[name] = torch.arange(start, end).float().reshape(shape)
            start = end
        with tempfile.TemporaryDirectory() as copy:
            here = pathlib.Path(copy)
            text = (folder / "adapter_config.json").read_text()
            (here / "adapter_config.json").write_text(text)
            save_file(tensors, here / "adapter_model.safetensors")
            try:
                manager = self.manager(here)
            except Exception as error:  # whatever SGLang raises
                return f"{type(error).__name__}: {error}"
        config = json.loads(text)
        held = Held(manager, config["r"], self.tensors)
        fates = {
            name: held.fate(name, tensors, _scale(config, name))
            for name in sorted(tensors)
        }
        return [_of_both(name, fates) for name in fates]


class Held:
    """What the kernels read of the adapter: SGLang's buffers."""

    def __init__(self, manager, rank: int, base: dict):
        import torch

        pool = manager.memory_pool
        self.rank, self.base = rank, base
        self.interleaved = any(n.endswith("experts.gate_up_proj") for n in base)
        self.scale = manager.loras["1"].scaling
        self.buffers = {"A": dict(pool.A_buffer), "B": {}}
        for key, layers in pool.B_buffer.items():
            times = self.scale if key.endswith("_moe") else 1
            self.buffers["B"][key] = [x / times for x in layers]
        for ab in "AB":
            for key, kind in (("embed_tokens", "embedding"), ("lm_head", "lm_head")):
                tables = getattr(pool, f"{kind}_{ab}_buffer")
                if key in tables:
                    self.buffers[ab][key] = [tables[key]]
        whole = [
            x.flatten() for d in self.buffers.values() for v in d.values() for x in v
        ]
        self.all = torch.cat(whole).unique() if whole else torch.zeros(0)

    def fate(self, name: str, tensors: dict, scale: float) -> str:
        """Whether a tensor lies whole where its module reads it, or elsewhere."""
        x = tensors[name]
        hits = (self.all - x.flatten()[:, None]).abs() < 0.25
        if not bool(hits.any()):
            return "left" if "base_layer.weight" in name else "lost"
        region = self._region(name)
        whole = region is not None and region.shape == x.shape
        fine = whole and bool(((region - x).abs() < 0.25).all())
        return "used" if fine and scale == self.scale else "altered"

    def _region(self, name: str):
        """Where the kernels read a tensor, from what PEFT's name says of it."""
        inner = re.fullmatch(
            r"(.+)\.lora_(?:embedding_)?([AB])(\.default)?(\.weight)?", name
        )
        if inner is None or "vision" in name or "visual" in name:
            return None
        module, ab = inner[1], inner[2]
        last = module.rpartition(".")[2]
        layer = re.search(r"layers\.(\d+)\.", name)
        expert = re.search(r"experts\.(\d+)\.", name)
        last = EXPERTS.get(last, last)
        stacked = ".experts." in name and not expert
        fused = PARTS.get(last, last) + ("_moe" if expert or stacked else "")
        found = self.buffers[ab].get(fused)
        if found is None:
            return None
        x = found[int(layer[1]) if layer else 0][0]
        x = x[int(expert[1])] if expert else x
        parts = [part for part, whole in PARTS.items() if whole == PARTS.get(last)]
        if not parts and stacked:
            return x
        if not parts:
            copies = {"qkv_proj": 3, "gate_up_proj": 2}.get(last, 1)
            return x[: x.shape[0] // copies] if ab == "A" else x
        at = parts.index(last)
        if stacked and ab == "B":
            half = x.shape[1] // 2
            return x[:, at::2] if self.interleaved else x[:, at * half :][:, :half]
        if stacked:
            return x[:, at * self.rank : (at + 1) * self.rank]
        if ab == "A":
            return x[at * self.rank : (at + 1) * self.rank]
        sizes = [self._rows(layer[1], part) for part in parts]
        return x[sum(sizes[:at]) : sum(sizes[: at + 1])]

    def _rows(self, layer: str, part: str) -> int:
        names = {part, *(k for k, v in EXPERTS.items() if v == part)}
        found = re.compile(rf"layers\.{layer}\..*({'|'.join(sorted(names))})\.weight$")
        return next(
            x.shape[0]
            for n, x in self.base.items()
            if found.search(n) and "vision" not in n
        )


def _of_both(name: str, fates: dict[str, str]) -> str:
    """What becomes of a factor, which is nothing without the other one."""
    if fates[name] != "used":
        return fates[name]
    other = name.translate(str.maketrans("AB", "BA"))
    for tried in (
        other,
        other.replace("_A.weight", "_A.default.weight"),
        other.replace(".default", ""),
    ):
        if tried in fates:
            return fates[tried]
    return "altered"


def _scale(config: dict, name: str) -> float:
    """PEFT's scale of the module that a tensor is of."""
    module = name.removeprefix(P).partition(".lora_")[0]

    def own(pattern: str, usual: float) -> float:
        found = (config.get(pattern) or {}).items()
        hits = (v for k, v in found if re.match(rf"(.*\.)?({k})$", module))
        return next(hits, usual)

    rank = own("rank_pattern", config["r"])
    alpha = own("alpha_pattern", config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def main(root: pathlib.Path) -> int:
    set_up(root)
    logging.disable()
    patterns = make_servers.sglang(root)["architectures"]

    def made(base: pathlib.Path) -> Sglang:
        about = json.loads((base / "config.json").read_text())
        return Sglang(patterns.get(about["architectures"][0], ""), base)

    cases = server_cases.cases() + server_cases.of_modules()
    return server_cases.recorded("SGLang", cases, made, TABLE)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
