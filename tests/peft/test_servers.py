"""What `peft.validate` says of servers, beside what their own code does."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from jlora.cli import run as run_command
from jlora.errors import PeftError
from jlora.peft import ServerReport, validate
from tests.golden import server_cases
from tests.golden.server_cases import Case, P

pytestmark = pytest.mark.once
GOLDEN = pathlib.Path(server_cases.__file__).parent
SAID = {
    "vllm": json.loads((GOLDEN / "servers.json").read_text()),
    "sglang": json.loads((GOLDEN / "servers.sglang.json").read_text()),
}
CASES = {
    "vllm": server_cases.cases(),
    "sglang": server_cases.cases() + server_cases.of_modules(),
}
WORDS = {"applied": "used", "copy": "left", "dropped": "lost", "altered": "altered"}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {n: server_cases.write_base(folder, n) for n in server_cases.bases()}


@pytest.mark.parametrize("server", CASES)
def test_server_as_its_own_code(server, bases, tmp_path):
    """Of adapters, most of them broken: is it loaded, and each tensor applied?"""
    wrong, cases = [], CASES[server]
    for number, case in enumerate(cases):
        here = tmp_path / str(number)
        server_cases.write_adapter(here, case)
        said = SAID[server][f"{number} {case.name}"]
        try:
            report = validate(here, bases[case.base], server=server)
        except PeftError:  # as of names that no file of PEFT's has
            own: str | list[str] = "refused"
        else:
            own = in_its_words(report)
        if isinstance(said, str) != isinstance(own, str) or (
            not isinstance(said, str) and said != own
        ):
            wrong.append((case.name, said, own))
    assert len(cases) == len(SAID[server]) > 280
    assert not wrong


def in_its_words(report: ServerReport) -> str | list[str]:
    outcomes = {v.name: v.outcome for v in report.verdicts}
    if "refused" in outcomes.values():
        return "refused"
    copies = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    return [
        "left" if name.endswith(copies) else WORDS[outcome]
        for name, outcome in sorted(outcomes.items())
    ]


@pytest.fixture
def judged(bases, tmp_path):
    """What a server does with an adapter of llama's q_proj that a test changed."""

    def judge(server: str, change=None, base: str = "gemma2", **options):
        modules = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
        tensors: dict = {}
        for module in modules:
            tensors |= server_cases.factors(module, 8, 8)
        case = Case("", base, server_cases.fields(modules), tensors)
        if change:
            change(case)
        server_cases.write_adapter(tmp_path / "adapter", case)
        return validate(tmp_path / "adapter", bases[base], server=server, **options)

    return judge


@pytest.mark.parametrize(
    ("server", "field", "outcome"),
    [
        ("sglang", "use_rslora", "altered"),
        ("sglang", "use_dora", "refused"),
        ("llama.cpp", "use_rslora", "altered"),
        ("vllm", "use_rslora", "applied"),
        ("peft", "use_rslora", "applied"),
        ("transformers", "use_rslora", "applied"),
    ],
)
def test_field_that_a_server_does_not_have(judged, server, field, outcome):
    report = judged(server, lambda case: case.config.update({field: True}))
    assert {v.outcome for v in report.verdicts} == {outcome}
    assert report.fine is (outcome == "applied")


def test_alpha_of_one_module(judged):
    report = judged("sglang", lambda c: c.config.update(alpha_pattern={"k_proj": 9}))
    assert [v.outcome for v in report.verdicts] == [
        "altered" if "k_proj" in v.name else "applied" for v in report.verdicts
    ]


def test_pattern_of_targets(judged):
    def narrow(case):
        case.config["target_modules"] = r".*\.(q|v)_proj"

    assert {v.outcome for v in judged("sglang", narrow).verdicts} == {"refused"}
    dropped = [v for v in judged("peft", narrow).verdicts if not v.fine]
    assert [v.outcome for v in dropped] == ["dropped"] * 2
    assert all("k_proj" in v.name for v in dropped)


def test_name_that_is_dropped_says_the_right_one(judged):
    def lose(case):
        case.tensors = {n.replace(".model.m", ".m"): x for n, x in case.tensors.items()}
        case.tensors = {
            n.replace("base_model.model.model.", "base_model.model."): x
            for n, x in case.tensors.items()
        }

    for server in ("vllm", "peft", "llama.cpp"):
        first = judged(server, lose).verdicts[0]
        assert first.outcome == ("refused" if server == "llama.cpp" else "dropped")
        assert first.instead.startswith("the base has 'model.layers.0.self_attn.")


def test_sglang_needs_parts_together(judged):
    def lose(case):
        for end in ("lora_A", "lora_B"):
            case.tensors.pop(f"base_model.model.{Q}.{end}.weight")

    first = judged("sglang", lose).verdicts[0]
    assert (first.outcome, first.why) == (
        "refused",
        "SGLang cannot make qkv_proj without q_proj",
    )


def test_head_that_is_tied(judged):
    def adapt_head(case):
        case.tensors |= server_cases.factors("lm_head", 20, 8)
        case.config["target_modules"].append("lm_head")

    told = {
        server: {v.name: v for v in judged(server, adapt_head).verdicts}
        for server in ("llama.cpp", "sglang", "peft")
    }
    name = "base_model.model.lm_head.lora_A.weight"
    assert told["llama.cpp"][name].outcome == "refused"
    assert "no tensor of its own" in told["llama.cpp"][name].why
    assert told["sglang"][name].fine
    assert told["peft"][name].fine


def test_all_linear_leaves_the_head_out(judged):
    def adapt_all(case):
        case.tensors |= server_cases.factors("lm_head", 20, 8)
        case.config["target_modules"] = "all-linear"

    told = {v.name: v.outcome for v in judged("peft", adapt_all).verdicts}
    heads = {outcome for name, outcome in told.items() if "lm_head" in name}
    assert heads == {"dropped"}
    assert set(told.values()) == {"dropped", "applied"}


def test_rank_above_the_servers(judged):
    report = judged("vllm", max_rank=1)
    assert report.verdicts[0].why == "rank 2 is above --max-lora-rank 1"
    assert judged("vllm").notes == ("start vllm with --max-lora-rank 8",)
    with pytest.raises(PeftError, match="has no --max-lora-rank 17, only 1, 8, 16"):
        judged("vllm", max_rank=17)


def _sized(name: str, *shape: int):
    def change(case):
        case.tensors[f"{P}{name}"] = np.ones(shape, np.float32)

    return change


def _prefixed_twice(case):
    case.tensors = {P + name: x for name, x in case.tensors.items()}


def _without(part: str):
    def change(case):
        case.tensors = {n: x for n, x in case.tensors.items() if part not in n}

    return change


@pytest.mark.parametrize(
    ("change", "tensor", "outcome"),
    [
        (_prefixed_twice, P + f"{Q}.lora_A.weight", "applied"),
        (_sized(f"{Q}.lora_B.weight", 9, 8), f"{Q}.lora_B.weight", "refused"),
        (_sized(f"{Q}.lora_A.weight", 9, 8), f"{Q}.lora_A.weight", "refused"),
        (_sized("x.q_proj.lora_A.weight", 2, 8), "x.q_proj.lora_A.weight", "refused"),
        (_sized(f"{Q}.lora_embedding_A", 2, 8), f"{Q}.lora_embedding_A", "refused"),
        (_sized(f"{Q}.lora_embedding_B", 8, 2), f"{Q}.lora_B.weight", "altered"),
        (_without("q_proj.lora_A"), f"{Q}.lora_B.weight", "altered"),
        (_without("lora_A"), f"{Q}.lora_B.weight", "refused"),
    ],
    ids=[
        "prefix twice",
        "B transposed, too large in one axis",
        "rank above what the server was started with",
        "A alone in no module",
        "a table's A in no table",
        "two tensors for one factor",
        "B alone in a part",
        "no A anywhere",
    ],
)
def test_vllm_reads_factors(judged, change, tensor, outcome):
    report = judged("vllm", change, max_rank=8)
    told = {v.name.removeprefix(P): v.outcome for v in report.verdicts}
    assert told[tensor] == outcome


def _config(**fields):
    def change(case):
        case.config.update(fields)

    return change


def _tied_and_saved(case):
    case.config.update(ensure_weight_tying=True, modules_to_save=["lm_head"])
    case.config["target_modules"].append("embed_tokens")
    for end, shape in (("A", (2, 20)), ("B", (8, 2))):
        _sized(f"model.embed_tokens.lora_embedding_{end}", *shape)(case)


def _saved(case):
    case.config["modules_to_save"] = ["layers.0.self_attn.q_proj"]
    _sized(f"{Q}.weight", 8, 8)(case)


def _without_body(case):
    case.tensors = {
        n.replace("model.layers", "layers"): x for n, x in case.tensors.items()
    }


def _b_as_a(case):
    del case.tensors[f"{P}{Q}.lora_B.weight"]
    _sized(f"{Q}.lora_A.weight", 12, 2)(case)


def _named(old: str, new: str):
    def change(case):
        case.tensors = {n.replace(old, new): x for n, x in case.tensors.items()}

    return change


def _rows_of_a_kept_table(case):
    case.config.update(trainable_token_indices=[1], modules_to_save=["embed_tokens"])
    _sized(f"{TABLE}.token_adapter.trainable_tokens_delta", 1, 8)(case)
    _sized(f"{TABLE}.token_adapter.base_layer.weight", 20, 8)(case)
    _sized(f"{TABLE}.weight", 20, 8)(case)


def _one_twice(case):
    _sized(f"{Q}.lora_A.default.weight", 3, 8)(case)


D_OF_Q = f"{Q}.lora_A.default.weight"
to_memory = _named("lora_A", "lora_A.default")
A_OF_Q, E_OF_Q = f"{Q}.lora_A.weight", f"{Q}.lora_embedding_A"
TABLE = "model.embed_tokens"
# As Unsloth's `get_peft_model` writes it.
UNSLOTH = (
    r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|mlp|dense).*?"
    r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\."
    r"(?:(?:q_proj|v_proj)))"
)


@pytest.mark.parametrize(
    ("server", "change", "tensor", "outcome"),
    [
        ("transformers", _tied_and_saved, f"{TABLE}.lora_embedding_A", "dropped"),
        ("peft", _config(ensure_weight_tying=True), A_OF_Q, "applied"),
        ("peft", _config(layers_to_transform=[0]), A_OF_Q, "applied"),
        ("peft", _config(layers_to_transform=1), A_OF_Q, "dropped"),
        ("peft", _config(exclude_modules=r".*\.q_\w+"), A_OF_Q, "dropped"),
        ("peft", _config(target_modules=UNSLOTH), A_OF_Q, "applied"),
        ("peft", _saved, A_OF_Q, "dropped"),
        ("peft", _sized(E_OF_Q, 2, 8), E_OF_Q, "dropped"),
        ("peft", _b_as_a, A_OF_Q, "refused"),
        ("peft", _config(trainable_token_indices=[1]), A_OF_Q, "refused"),
        ("transformers", _config(trainable_token_indices=[1]), A_OF_Q, "applied"),
        ("peft", _config(init_lora_weights="loftq"), A_OF_Q, "refused"),
        ("peft", _config(init_lora_weights="orthogonal"), A_OF_Q, "applied"),
        ("peft", _config(target_modules=["q_proj", "norm"]), A_OF_Q, "refused"),
        ("peft", _config(target_modules=None), A_OF_Q, "refused"),
        ("peft", _config(task_type="CAUSAL_LM"), A_OF_Q, "applied"),
        ("peft", _config(task_type="ANY"), A_OF_Q, "refused"),
        ("peft", _config(target_parameters=["q_proj.weight"]), A_OF_Q, "refused"),
        ("transformers", _without_body, A_OF_Q.removeprefix("model."), "applied"),
        ("peft", _without_body, A_OF_Q.removeprefix("model."), "dropped"),
        ("transformers", _prefixed_twice, P + A_OF_Q, "applied"),
        ("peft", _config(layer_replication=[[0, 1], [0, 1]]), A_OF_Q, "applied"),
        ("peft", _config(layer_replication=[[0, 9]]), A_OF_Q, "refused"),
        ("peft", _config(layer_replication=[[1, 1]]), A_OF_Q, "refused"),
        ("peft", _config(layer_replication=[0, 1]), A_OF_Q, "refused"),
        ("peft", _config(init_lora_weights="pissa_niter_4"), A_OF_Q, "applied"),
        ("peft", _config(init_lora_weights="other"), A_OF_Q, "refused"),
        ("peft", _config(modules_to_save=["proj"]), A_OF_Q, "refused"),
        ("peft", to_memory, D_OF_Q, "applied"),
        ("transformers", to_memory, D_OF_Q, "dropped"),
        ("peft", _one_twice, D_OF_Q, "dropped"),
        ("peft", _rows_of_a_kept_table, f"{TABLE}.weight", "dropped"),
        (
            "transformers",
            _rows_of_a_kept_table,
            f"{TABLE}.token_adapter.base_layer.weight",
            "applied",
        ),
    ],
)  # fmt: skip
def test_peft_goes_by_the_config(judged, server, change, tensor, outcome):
    report = judged(server, change)
    told = {v.name.removeprefix(P): v.outcome for v in report.verdicts}
    assert told[tensor] == outcome


@pytest.fixture
def outcomes(tmp_path):
    """What PEFT does with A and B of a module of a model of given shapes."""

    def judge(config, shapes, module, a, b, server="peft", **fields):
        here = tmp_path / str(len([*tmp_path.iterdir()]))
        base = server_cases.write_model(here / "base", config, shapes)
        sizes = {f"{P}{module}.lora_A.weight": a, f"{P}{module}.lora_B.weight": b}
        tensors = {name: np.ones(size, np.float32) for name, size in sizes.items()}
        case = Case("", "", server_cases.fields([module]) | fields, tensors)
        server_cases.write_adapter(here / "adapter", case)
        report = validate(here / "adapter", base, server=server)
        return {v.outcome for v in report.verdicts if v.name.startswith(P)}

    return judge


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
CONV1D = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("a", "b", "fields", "wanted"),
    [
        ((2, 8), (24, 2), {}, "applied"),
        ((2, 8), (24, 2), {"init_lora_weights": "olora"}, "refused"),
        ((2, 24), (8, 2), {"init_lora_weights": "olora"}, "altered"),
        ((2, 8), (24, 2), {"init_lora_weights": "pissa"}, "applied"),
        ((9, 8), (24, 9), {"init_lora_weights": "pissa", "r": 9}, "refused"),
        ((8, 8), (24, 8), {"init_lora_weights": "pissa", "r": 9}, "applied"),
        ((2, 8), (24, 2), {"layer_replication": [[0, 1]]}, "refused"),
    ],
)
def test_inits_and_layers_of_gpt2(outcomes, a, b, fields, wanted):
    shapes = {f"{CONV1D}.weight": (8, 24), f"{CONV1D}.bias": (24,)}
    assert outcomes(GPT2, shapes, CONV1D, a, b, **fields) == {wanted}


@pytest.mark.parametrize(
    ("kind", "file", "module"),
    [
        ("qwen2_vl", "model.layers.0.q", "model.language_model.layers.0.q"),
        ("qwen2_5_vl", "visual.blocks.0.mlp.up", "model.visual.blocks.0.mlp.up"),
        ("vit", "vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"),
    ],
)
def test_names_that_a_class_has_and_its_files_have_not(outcomes, kind, file, module):
    config = {"architectures": ["Ours"], "model_type": kind}
    shapes = {f"{file}.weight": (12, 8)}
    assert outcomes(config, shapes, module, (2, 8), (12, 2)) == {"applied"}
    fields = {"server": "transformers", "target_modules": [module]}
    assert outcomes(config, shapes, file, (2, 8), (12, 2), **fields) == {"applied"}


@pytest.mark.parametrize(
    ("kind", "targets", "module", "wanted"),
    [
        ("qwen3_moe", ["gate"], "mlp.gate", "applied"),
        ("qwen2_moe", ["gate"], "mlp.gate", "refused"),
        ("qwen2_moe", ["up_proj"], "mlp.shared_expert.up_proj", "applied"),
        ("qwen3_moe", ["up_proj"], "mlp.shared_expert.up_proj", "refused"),
    ],
)
def test_names_that_peft_takes_out_of_the_targets(
    outcomes, kind, targets, module, wanted
):
    begin = "model.layers.0.mlp"
    shapes = {f"{begin}.gate.weight": (3, 8)}
    parts = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    for place in ("shared_expert", *(f"experts.{i}" for i in range(3))):
        shapes |= {f"{begin}.{place}.{n}.weight": size for n, size in parts.items()}
    config = {"architectures": ["OursForCausalLM"], "model_type": kind}
    name = f"model.layers.0.{module}"
    rows = shapes[f"{name}.weight"][0]
    fields = {"target_modules": targets}
    assert outcomes(config, shapes, name, (2, 8), (rows, 2), **fields) == {wanted}


def test_vllm_takes_factors_of_a_head_for_its_weight(outcomes):
    config = {"architectures": ["Qwen3ForSequenceClassification"]}
    sizes = {"score.weight": (3, 8)}, "score", (2, 8), (3, 2), "vllm"
    assert outcomes(config, *sizes) == {"applied"}
    assert outcomes(config, *sizes, modules_to_save=["score"]) == {"refused"}


def test_layers_that_are_there_twice(outcomes):
    shapes = {f"model.layers.{i}.up.weight": (8, 8) for i in range(2)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for count, wanted in ((2, "dropped"), (3, "applied")):
        spans = {"layer_replication": [[0, 1]] * count}
        name = "model.layers.2.up"
        assert outcomes(config, shapes, name, (2, 8), (8, 2), **spans) == {wanted}


def test_parts_that_vllm_finds_by_the_config(bases, tmp_path):
    """Gate and up of a shared expert are one module, those of experts another."""
    name = "model.layers.0.mlp.shared_expert."
    parts = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    shapes = {f"{name}{part}.weight": shape for part, shape in parts.items()}
    config = {"architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 20}
    base = server_cases.write_model(tmp_path / "base", config, shapes)
    tensors = server_cases.factors(f"{name}up_proj", 12, 8)
    case = Case("", "", server_cases.fields([f"{name}up_proj"]), tensors)
    server_cases.write_adapter(tmp_path / "adapter", case)
    first = validate(tmp_path / "adapter", base).verdicts[0]
    assert first.outcome == "applied"
    assert first.target == f"{name}gate_up_proj (up_proj)"


def test_index_is_enough(judged, bases):
    shapes = server_cases.bases()["gemma2"][1]
    index = {"weight_map": dict.fromkeys(shapes, "model-00001-of-00002.safetensors")}
    base = bases["gemma2"]
    (base / "model.safetensors").rename(base / "kept")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        assert judged("vllm").fine
    finally:
        (base / "model.safetensors.index.json").unlink()
        (base / "kept").rename(base / "model.safetensors")


def test_base_that_says_nothing(judged, tmp_path):
    judged("vllm")
    adapter = tmp_path / "adapter"
    with pytest.raises(PeftError, match="There is no directory"):
        validate(adapter, tmp_path / "nowhere")
    base = tmp_path / "base"
    base.mkdir()
    with pytest.raises(PeftError, match="No such file"):
        validate(adapter, base)
    (base / "config.json").write_text("{}")
    with pytest.raises(PeftError, match="has no `architectures`"):
        validate(adapter, base)
    (base / "config.json").write_text('{"architectures": ["OursForCausalLM"]}')
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"w": "x"}}')
    with pytest.raises(PeftError, match="does not know what vLLM calls the modules of"):
        validate(adapter, base)
    with pytest.raises(PeftError, match="server must be one of vllm, sglang, peft"):
        validate(adapter, base, server="triton")


def test_adapter_of_another_tool_is_converted_first(bases, tmp_path):
    named = {"lora_unet_x.lora_down.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(named, tmp_path / "x.safetensors")
    with pytest.raises(PeftError, match="is an adapter of kohya's sd-scripts"):
        validate(tmp_path / "x.safetensors", bases["gemma2"])


def test_command_exits_with_1_where_a_tensor_is_dropped(bases, tmp_path, capsys):
    case = next(c for c in server_cases.cases() if c.name == "gemma3.plain")
    server_cases.write_adapter(tmp_path / "good", case)
    base = str(bases["gemma3"])

    def run(*words: str) -> tuple[int, str]:
        code = run_command(["validate", *words])
        return code, capsys.readouterr().out

    code, out = run(str(tmp_path / "good"), "--for", "vllm", "--base", base)
    assert code == 0
    assert "language_model.model.layers.{0..1}.self_attn.qkv_proj (q_proj)" in out
    assert "lora_{A,B}.weight (×2)  applied" in out
    case.tensors = {
        n.replace("layers.1", "layers.7"): x for n, x in case.tensors.items()
    }
    server_cases.write_adapter(tmp_path / "bad", case)
    words = (str(tmp_path / "bad"), "--for", "vllm", "--base", base)
    code, out = run(*words)
    assert code == 1
    assert "dropped" in out
    code, out = run(*words, "--json")
    told = json.loads(out)
    assert (code, told["fine"], told["server"]) == (1, False, "vllm")
    assert {v["outcome"] for v in told["verdicts"]} == {"applied", "dropped"}
    assert run(str(tmp_path / "bad"), "--for", "vllm")[0] == 2
    assert run(base, "--for", "vllm", "--base", base)[0] == 2
    assert run(str(tmp_path / "bad"), "--max-lora-rank", "8")[0] == 2
