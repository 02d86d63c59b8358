"""Reads what servers say of their models, into `jlora/peft/_servers/models.json`.

    python -m tests.golden.make_servers VLLM SGLANG LLAMA_CPP TRANSFORMERS PEFT

Each is a folder where the source is unpacked: wheels of vLLM, SGLang, transformers and
PEFT from PyPI, and llama.cpp, as the source of `llama-cpp-python` has it. Nothing of
them is run, and they need not be installed: classes are read as syntax trees.
"""

import ast
import functools
import json
import pathlib
import re
import sys
from typing import Any

FILE = pathlib.Path(__file__).parents[2] / "jlora" / "peft" / "_servers" / "models.json"
FUSED = {name: name for name in ("mixtral", "qwen2_moe")}  # that PEFT converts
VERSIONS = re.compile(r"^Version: (.+)$", re.MULTILINE)
READ = (
    "packed_modules_mapping", "embedding_modules", "hf_to_vllm_mapper",
    "lora_skip_prefixes", "is_3d_moe_weight", "is_non_gated_moe",
)  # fmt: skip


class Mapper(dict):
    """vLLM's `WeightsMapper`: tables of what names are called, one after the other."""

    def __init__(self, **tables: Any):
        super().__init__({k: v for k, v in tables.items() if v})

    def __or__(self, other: Any) -> "Mapper":
        keys = {*self, *other}
        return Mapper(**{k: {**self.get(k, {}), **other.get(k, {})} for k in keys})


class Models:
    """The model classes of vLLM, as syntax trees."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module:
        for file in (f"{module}.py", f"{module}/__init__.py"):
            if (self.root / file).exists():
                return ast.parse((self.root / file).read_text())
        return ast.parse("")

    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        for node in self.tree(module).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and node.module:
                own = node.level == 1 or ".models." in node.module
                named = {a.asname or a.name: a.name for a in node.names}
                if own and name in named:
                    folder = module.rpartition("/")[0] if node.level == 1 else ""
                    inner = node.module.rpartition("models.")[2].replace(".", "/")
                    tried = [f"{folder}/{inner}".strip("/"), inner]
                    hits = (self.find(m, named[name]) for m in tried if m != module)
                    return next(filter(None, hits), None)
        return None

    def attributes(self, module: str, name: str) -> dict[str, Any]:
        """What a class says, its bases first; `bases` has all their names."""
        found = self.find(module, name)
        if found is None:
            return {"bases": {name}}
        module, node = found
        out: dict[str, Any] = {"bases": {name}}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name):
                own = self.attributes(module, base.id)
                out = {**out, **own, "bases": out["bases"] | own["bases"]}
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                if statement.name == "get_mm_mapping":
                    out["mm"] = ast.unparse(statement.body[-1])
                elif statement.name == "__init__":
                    out["siblings"] = out.get("siblings", {}) | _packed_by(statement)
                elif statement.name in READ:
                    out[statement.name] = None  # decided when it runs
            value = getattr(statement, "value", None)
            targets = getattr(
                statement, "targets", [getattr(statement, "target", None)]
            )
            for target in targets if value is not None else []:
                if isinstance(target, ast.Name) and target.id in READ:
                    out[target.id] = self.value(module, value)
        return out

    def value(self, module: str, node: ast.expr) -> Any:
        """The value of an expression: literals, mappers, and what other classes say."""
        names = Names(self, module)
        try:
            return eval(compile(ast.Expression(node), "vllm", "eval"), {}, names)
        except Exception:
            return None


def _packed_by(function: ast.FunctionDef) -> dict[str, list[str]]:
    """The entries that a function adds to `packed_modules_mapping`, if it does."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if ast.unparse(target.value) == "self.packed_modules_mapping":
                found[ast.literal_eval(target.slice)] = ast.literal_eval(node.value)
    return found


class Names(dict):
    """What names mean in a module of vLLM's."""

    def __init__(self, models: Models, module: str):
        super().__init__(WeightsMapper=Mapper, dict=dict, re=re, regex=re)
        self.models, self.module = models, module

    def __missing__(self, name: str) -> Any:
        found = self.models.attributes(self.module, name)
        if len(found) < 2:
            raise KeyError(name)
        return type(name, (), found)


def vllm(root: pathlib.Path) -> dict[str, Any]:
    models = Models(root / "vllm/model_executor/models")
    out: dict[str, Any] = {}
    for node in models.tree("registry").body:
        value = getattr(node, "value", None)
        if not isinstance(value, ast.Dict):
            continue
        for key, where in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(where, ast.Tuple):
                module, name = ast.literal_eval(where)
                out[key.value] = of_class(models, module.replace(".", "/"), name)
    return {"architectures": dict(sorted(out.items())), "ranks": ranks(root)}


def of_class(models: Models, module: str, name: str) -> dict[str, Any] | None:
    """What vLLM's class of an architecture says; None if it takes no adapters."""
    found = models.attributes(module, name)
    if "SupportsLoRA" not in found["bases"]:
        return None
    own: dict[str, Any] = {}
    mapper = found.get("hf_to_vllm_mapper", {}) or {}
    kinds = {"substr": "orig_to_new_substr", "prefix": "orig_to_new_prefix"}
    kinds["suffix"] = "orig_to_new_suffix"
    for short, long in kinds.items():
        if mapper.get(long):
            own[short] = [*mapper[long].items()]  # their order counts
    language = re.search(r"language_model='([^']+)'", found.get("mm", ""))
    if "mm" in found and language is None:
        own["odd"] = True
    odd = mapper.keys() & {"orig_to_new_regex", "orig_to_new_renaming"}
    packed = found.get("packed_modules_mapping")
    if odd or packed is None:
        own["odd"] = True
    own |= {
        "packed": packed or {},
        "embeddings": [*(found.get("embedding_modules") or ())],
    }
    own["siblings"] = found.get("siblings")
    if language:
        own["language"] = language[1]
    if found.get("is_3d_moe_weight"):
        own["stacked_experts"] = True
    if found.get("lora_skip_prefixes"):
        own["skip"] = found["lora_skip_prefixes"]
    return {key: value for key, value in own.items() if value}


def ranks(root: pathlib.Path) -> list[int]:
    tree = ast.parse((root / "vllm/config/lora.py").read_text())
    (found,) = (
        ast.literal_eval(node.value.slice)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "MaxLoRARanks"
    )
    return list(found)


def sglang(root: pathlib.Path) -> dict[str, Any]:
    """The architectures of SGLang, and a pattern of what takes adapters, or nothing."""
    out: dict[str, str] = {}
    for file in sorted((root / "sglang/srt/models").rglob("*.py")):
        tree = ast.parse(file.read_text())
        patterns = {
            node.name: pattern
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            for pattern in [_lora_pattern(node)]
            if pattern
        }
        bases = {
            node.name: [ast.unparse(base) for base in node.bases]
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        }
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "EntryClass"
            ):
                value = node.value
                names = value.elts if isinstance(value, ast.List) else [value]
                for name in map(ast.unparse, names):
                    own = [
                        patterns[n]
                        for n in (name, *bases.get(name, ()))
                        if n in patterns
                    ]
                    out[name] = own[0] if own else ""
    tree = ast.parse((root / "sglang/srt/lora/utils.py").read_text())
    known: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and "_KNOWN_LORA" in ast.unparse(
            node.targets[0]
        ):
            known = re.findall(r"'([\w.]+)'", ast.unparse(node.value))
    return {"architectures": dict(sorted(out.items())), "modules": sorted(known)}


def _lora_pattern(node: ast.ClassDef) -> str:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and "lora_pattern" in ast.unparse(
            statement.targets[0]
        ):
            call = statement.value
            return ast.literal_eval(call.args[0])
    return ""


def llama_cpp(root: pathlib.Path) -> dict[str, Any]:
    """The architectures that llama.cpp converts."""
    files = [root / "convert_hf_to_gguf.py", *root.glob("conversion/*.py")]
    found: set[str] = set()
    for file in filter(pathlib.Path.exists, files):
        for names in re.findall(r"ModelBase\.register\(([^)]*)\)", file.read_text()):
            found |= set(re.findall(r"\"(\w+)\"", names))
    return {"architectures": sorted(found)}


def transformers(root: pathlib.Path) -> dict[str, Any]:
    """Types of models whose weights are converted, and which have experts in one.

    `converted` has what the conversions are registered for, `architectures` the types
    whose experts are one parameter, and as in which type.
    """
    tree = ast.parse((root / "transformers/conversion_mapping.py").read_text())
    alike: dict[str, str] = {}
    converted: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target = ast.unparse(node.targets[0])
        if "_MODEL_TO_CONVERSION" in target:
            alike = ast.literal_eval(node.value)
        elif target == "mapping" and isinstance(node.value, ast.Dict):
            converted |= {ast.literal_eval(key) for key in node.value.keys if key}
        elif target.startswith("mapping[") and "model_type" not in target:
            converted.add(ast.literal_eval(node.targets[0].slice))
    own = {k: v for k, v in alike.items() if v in FUSED}
    return {
        "converted": sorted(converted | {*alike}),
        "architectures": dict(sorted({**own, **FUSED}.items())),
    }


def peft(root: pathlib.Path) -> dict[str, Any]:
    """What PEFT adapts of a type of model if a config does not say: names, no regex."""
    tree = ast.parse((root / "peft/utils/constants.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and "_TO_LORA_" in ast.unparse(node.targets[0]):
            found = ast.literal_eval(node.value)
            lists = {k: v for k, v in found.items() if isinstance(v, list)}
            return {"architectures": dict(sorted(lists.items()))}
    raise ValueError("constants.py has no table of types.")


def version(root: pathlib.Path, name: str) -> str:
    (about,) = root.glob(f"{name}-*.dist-info/METADATA")
    return VERSIONS.search(about.read_text())[1]


def main(*folders: str) -> None:
    roots = [pathlib.Path(folder) for folder in folders]
    found = {
        "vllm": {"version": version(roots[0], "vllm"), **vllm(roots[0])},
        "sglang": {"version": version(roots[1], "sglang"), **sglang(roots[1])},
        "llama.cpp": llama_cpp(roots[2]),
        "transformers": {
            "version": version(roots[3], "transformers"),
            **transformers(roots[3]),
        },
        "peft": {"version": version(roots[4], "peft"), **peft(roots[4])},
    }
    lines = []
    for name, about in found.items():
        models = about.pop("architectures")
        rest = "".join(
            f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in about.items()
        )
        if isinstance(models, dict):
            own = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in models.items()]
            table = "{\n" + ",\n".join(own) + "\n }"
        else:
            table = "[\n" + ",\n".join(f"  {json.dumps(k)}" for k in models) + "\n ]"
        lines.append(f'{json.dumps(name)}: {{\n{rest} "architectures": {table}\n}}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(FILE)


if __name__ == "__main__":
    main(*sys.argv[1:])
