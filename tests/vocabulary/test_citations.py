"""BibTeX of what is used: each paper once, and one for everything that has one."""

import re

import jax.numpy as jnp
import pytest

import jlora
from jlora.citations import PAPERS, WITHOUT_PAPER, entry_of
from jlora.methods import INITS, METHODS


def keys(text):
    return re.findall(r"^@misc\{(.+),$", text, flags=re.MULTILINE)


def test_every_method_and_init_has_a_paper_or_is_known_to_have_none():
    known = {*PAPERS, *WITHOUT_PAPER}
    used = {entry_of(name) for name in (*METHODS, *INITS)}
    assert used <= known, "add an entry to jlora/citations.py"


def test_entries_are_unlike_each_other_and_well_formed():
    for field in ("key", "title", "arxiv"):
        values = [getattr(paper, field) for paper in PAPERS.values()]
        assert len(set(values)) == len(values)
    for paper in PAPERS.values():
        assert re.fullmatch(r"[a-z]+20\d\d[a-z]+", paper.key)
        assert str(paper.year) in paper.key
        assert re.fullmatch(r"2[0-9](0[1-9]|1[0-2])\.\d{5}", paper.arxiv)
        assert paper.year in (2000 + int(paper.arxiv[:2]), 2001 + int(paper.arxiv[:2]))
        assert paper.title.count("{") == paper.title.count("}")
        assert all("," in author for author in paper.authors.split(" and "))


def test_a_config_cites_itself_and_its_rules_once():
    rule = jlora.Rule("**", method="lora", init="gaussian")
    assert keys(jlora.cite(jlora.LoraConfig(rules=(rule, rule)))) == ["hu2021lora"]
    both = jlora.cite(jlora.LoraConfig(rslora=True), "lora_plus", "lora_fa", "rslora")
    assert keys(both) == [
        "hu2021lora",
        "kalajdzievski2023rslora",
        "hayou2024loraplus",
        "zhang2023lorafa",
    ]


def test_a_plan_cites_what_its_weights_use():
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((1, 4))
    config = jlora.LoraConfig(rank=2, rslora=True)
    plan = jlora.plan(lambda p, x: x @ p["w"], params, x, config=config)
    assert keys(jlora.cite(plan)) == ["hu2021lora", "kalajdzievski2023rslora"]
    plan = jlora.plan(lambda p, x: x @ p["w"], jlora.quantize(params), x, config=config)
    assert keys(jlora.cite(plan))[2:] == ["dettmers2023qlora"]


def test_braces_balance():
    text = jlora.cite(jlora.LoraConfig(), *PAPERS)
    assert len(keys(text)) == len(PAPERS)
    assert text.count("{") == text.count("}")


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(jlora.ConfigError, match=r"No paper is known for 'lorax'.*dora"):
        jlora.cite(jlora.LoraConfig(), "lora_fa", "lorax")
