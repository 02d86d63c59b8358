"""notebooks/: valid, outputs kept, links that lead somewhere; the code runs."""

import json
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

import jlora
from docs import address
from tests.examples.chat_helpers import conversations, hub_directory

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)


def read(file: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook as it is in the file, not brought to a newer format."""
    return nbformat.reads(
        file.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT
    )


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What each code cell printed, by the cell's id."""
    return {
        cell.id: "".join(out.text for out in cell.outputs if "text" in out)
        for cell in code_cells(notebook)
    }


def plots(notebook: nbformat.NotebookNode) -> set[str]:
    """The ids of the cells that show a picture."""
    return {
        cell.id
        for cell in code_cells(notebook)
        if any("image/png" in out.get("data", ()) for out in cell.outputs)
    }


def number(text: str, *, after: str) -> float:
    """The first number that follows the words `after`."""
    _, found, rest = text.partition(after)
    assert found, text
    return float(re.search(r"\d+(\.\d+)?(e-?\d+)?", rest)[0])


def execute(
    file: pathlib.Path, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> nbformat.NotebookNode:
    """The notebook after a run on this Python, which leaves nothing outside `folder`.

    Raises nbclient's CellExecutionError if a cell does.
    """
    # The kernel inherits these. Where it runs, jlora need not be installed.
    old = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT)] + ([old] if old else []))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TMPDIR", str(folder))
    # Also hides a kernel `python3` in the home directory, which may be another Python.
    for name in ("DATA", "RUNTIME", "CONFIG"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(folder / name.lower()))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures inline
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    notebook = read(file)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,  # for each cell
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook


@each_notebook
def test_notebook_is_valid(file):
    notebook = read(file)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


@each_notebook
def test_outputs_are_kept_from_one_clean_run(file):
    notebook = read(file)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [out for cell in cells for out in cell.outputs]
    assert outputs
    kinds = {out.get("name", out.output_type) for out in outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}
    text = json.dumps(outputs)
    local = re.search(r"/(tmp|home|root|Users|content)/|site-packages|[A-Z]:\\\\", text)
    assert not local, text[local.start() - 80 : local.end() + 80]


@each_notebook
def test_first_cells_set_jlora_up(file):
    notebook = read(file)
    assert notebook.cells[0].source.startswith(f"# {int(file.stem[:2])}. ")
    assert code_cells(notebook)[0] is notebook.cells[1]
    assert notebook.cells[1].source == address.setup_cell(address.read())


@each_notebook
def test_links_into_the_project_lead_somewhere(file):
    cells = [c.source for c in read(file).cells if c.cell_type == "markdown"]
    links = re.findall(r"\]\((\.\./[^)#]+)", "\n".join(cells))
    assert links
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    file = ROOT / "notebooks" / "01-quickstart.ipynb"
    notebook = execute(file, tmp_path, monkeypatch)
    out, kept = printed(notebook), printed(read(file))

    # What does not depend on arithmetic is what the file shows.
    assert plots(notebook) == plots(read(file)) == {"data", "plot"}
    for cell in ("plan", "split", "errors"):
        assert out[cell] == kept[cell], "Run the notebook again and keep its outputs."
    assert "**/attention/query/kernel' matched none of" in out["errors"]
    assert "nearest: 'params/block_0/attn/query/kernel'" in out["errors"]

    before = number(out["train"], after="before")
    after = number(out["train"], after="after")
    assert number(out["train"], after="at step 0:") == 0
    assert number(out["pretrain"], after="as they are:") > 0.95
    assert number(out["pretrain"], after="in the mirror:") == before < 0.5
    assert after > 0.8

    rows = [re.split(r"  +", line) for line in out["compare"].splitlines()[1:]]
    accuracy = {name: float(last) for name, *_, last in rows}
    assert accuracy["pretrained"] == before
    assert accuracy["LoRA on query, value"] == after
    assert before + 0.2 < accuracy["head only"] < after - 0.02
    assert accuracy["LoRA on all linear"] > after - 0.05
    assert accuracy["full fine-tune"] > after - 0.05

    assert number(out["nnx"], after="before") < 0.6
    assert number(out["nnx"], after=", after") > 0.8

    largest = number(out["merge"], after="largest logit")
    assert 0 < number(out["merge"], after="difference") < 1e-5 * largest
    base, factors, merged = (
        number(out["merge"], after=f"\n{name}")
        for name in ("base", "with factors", "merged")
    )
    assert base == merged < factors < 1.1 * base

    # Restored and exported, it is the model that was trained.
    assert number(out["save"], after="in the mirror") == after
    assert number(out["export"], after="in the mirror") == after


@pytest.mark.slow
def test_eight_chips_runs(tmp_path, monkeypatch):
    file = ROOT / "notebooks" / "05-eight-chips.ipynb"
    notebook = execute(file, tmp_path, monkeypatch)
    out, kept = printed(notebook), printed(read(file))
    assert out["imports"] == "8 × cpu\n"
    assert plots(notebook) == plots(read(file)) == {"plot"}
    for cell in ("mesh", "plan", "split"):
        assert out[cell] == kept[cell], "Run the notebook again and keep its outputs."

    assert number(out["train"], after="loss") > 4
    assert number(out["train"], after="30 steps") < 1
    lora, full = out["memory"].splitlines()
    assert number(lora, after="arguments") < number(full, after="arguments") * 0.7
    assert "the same bits: True" in out["resume"]
    assert number(out["resume"], after="40 steps") < 0.5
    assert number(out["merge"], after="differ by") < 1e-3
    assert "2 devices" in out["merge"]
    dense, codes, loss = out["quantise"].splitlines()[1:]
    assert number(codes, after="codes") < number(dense, after="dense") / 3
    assert number(loss, after="over codes") < 1


@pytest.mark.slow
def test_fine_tune_an_llm_runs(tmp_path, monkeypatch):
    """The files that the notebook takes if they lie beside it are small ones here."""
    file = ROOT / "notebooks" / "02-fine-tune-an-llm.ipynb"
    hub_directory(tmp_path / "my-model")
    conversations(tmp_path / "talks.jsonl")
    notebook = execute(file, tmp_path, monkeypatch)
    assert notebook.cells[3].source == address.program_cell(address.read())
    out = printed(notebook)
    assert plots(notebook) == plots(read(file)) == {"loss"}
    assert "adapted: 2 of 2 blocks" in out["train"]
    losses = re.search(r"held-out loss ([\d.]+) → ([\d.]+)", out["train"])
    assert float(losses[2]) < float(losses[1])
    assert out["again"].startswith("step 20: ")
    assert "adapter/adapter_model.safetensors" in out["out"]
    assert "merged/tokenizer.json" in out["out"]
    runs = tmp_path / "runs" / "headlines"
    assert jlora.checkpoint.restore(runs / "checkpoints").step == 20


# A cell that runs only where torch is installed, with the outputs of such a run.
ONLY_WITH_TORCH = {"torch"}
OWN_TEST = {"01-quickstart", "02-fine-tune-an-llm", "05-eight-chips"}
OTHERS = [file for file in NOTEBOOKS if file.stem not in OWN_TEST]


@pytest.mark.slow
@pytest.mark.parametrize("file", OTHERS, ids=lambda f: f.stem)
def test_notebook_says_what_it_shows(file, tmp_path, monkeypatch):
    out, kept = printed(execute(file, tmp_path, monkeypatch)), printed(read(file))
    for cell in out.keys() - ONLY_WITH_TORCH:
        own, shown = numbers(out[cell]), numbers(kept[cell])
        assert re.sub(NUMBER, "#", out[cell]) == re.sub(NUMBER, "#", kept[cell])
        # Accuracies and losses may differ a little between processors.
        assert own == pytest.approx(shown, rel=0.1, abs=0.05), out[cell]


NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(NUMBER, text)]
