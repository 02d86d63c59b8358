"""Cites the papers behind a config or a plan, as BibTeX."""

from typing import NamedTuple

from ._plan.plan import Plan
from ._tables import listed
from .config import LoraConfig
from .errors import ConfigError


class Paper(NamedTuple):
    """One entry: BibTeX key, title, authors, year and number on arXiv.

    Examples:
      >>> PAPERS["dora"].arxiv
      '2402.09353'
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str


PAPERS = {
    "lora": Paper(
        "hu2021lora",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and "
        "Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu",
        2021,
        "2106.09685",
    ),
    "rslora": Paper(
        "kalajdzievski2023rslora",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}",
        "Kalajdzievski, Damjan",
        2023,
        "2312.03732",
    ),
    "dora": Paper(
        "liu2024dora",
        "{DoRA}: Weight-Decomposed Low-Rank Adaptation",
        "Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and "
        "Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung",
        2024,
        "2402.09353",
    ),
    "vera": Paper(
        "kopiczko2023vera",
        "{VeRA}: Vector-based Random Matrix Adaptation",
        "Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.",
        2023,
        "2310.11454",
    ),
    "adalora": Paper(
        "zhang2023adalora",
        "{AdaLoRA}: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and "
        "Karampatziakis, Nikos and He, Pengcheng and Cheng, Yu and Chen, Weizhu and "
        "Zhao, Tuo",
        2023,
        "2303.10512",
    ),
    "lora_xs": Paper(
        "balazy2024loraxs",
        "{LoRA-XS}: Low-Rank Adaptation with Extremely Small Number of Parameters",
        "Ba{\\l}azy, Klaudia and Banaei, Mohammadreza and Aberer, Karl and "
        "Tabor, Jacek",
        2024,
        "2405.17604",
    ),
    "mica": Paper(
        "rudiger2026mica",
        "{MiCA} Learns More Knowledge Than {LoRA} and Full Fine-Tuning",
        'R{\\"u}diger, Sten and Raschka, Sebastian',
        2026,
        "2604.01694",
    ),
    "alora": Paper(
        "greenewald2025alora",
        "Activated {LoRA}: Fine-tuned {LLM}s for Intrinsics",
        "Greenewald, Kristjan and Lastras, Luis and Parnell, Thomas and "
        "Shah, Vraj and Popa, Lucian and Zizzo, Giulio and Gunasekara, Chulaka and "
        "Rawat, Ambrish and Cox, David",
        2025,
        "2504.12397",
    ),
    "zero_a": Paper(
        "hayou2024init",
        "The Impact of Initialization on {LoRA} Finetuning Dynamics",
        "Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin",
        2024,
        "2406.08447",
    ),
    "pissa": Paper(
        "meng2024pissa",
        "{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large "
        "Language Models",
        "Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan",
        2024,
        "2404.02948",
    ),
    "olora": Paper(
        "buyukakyuz2024olora",
        "{OLoRA}: Orthonormal Low-Rank Adaptation of Large Language Models",
        'B{\\"u}y{\\"u}kaky{\\"u}z, Kerim',
        2024,
        "2406.01775",
    ),
    "eva": Paper(
        "paischer2024eva",
        "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        "Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and "
        "Alkin, Benedikt and Deisenroth, Marc Peter and Hochreiter, Sepp",
        2024,
        "2410.07170",
    ),
    "lora_ga": Paper(
        "wang2024loraga",
        "{LoRA-GA}: Low-Rank Adaptation with Gradient Approximation",
        "Wang, Shaowen and Yu, Linxi and Li, Jian",
        2024,
        "2407.05000",
    ),
    "corda": Paper(
        "yang2024corda",
        "{CorDA}: Context-Oriented Decomposition Adaptation of Large Language Models "
        "for Task-Aware Parameter-Efficient Fine-tuning",
        "Yang, Yibo and Li, Xiaojie and Zhou, Zhongzhu and Song, Shuaiwen Leon and "
        "Wu, Jianlong and Nie, Liqiang and Ghanem, Bernard",
        2024,
        "2406.05223",
    ),
    "loftq": Paper(
        "li2023loftq",
        "{LoftQ}: {LoRA}-Fine-Tuning-Aware Quantization for Large Language Models",
        "Li, Yixiao and Yu, Yifan and Liang, Chen and He, Pengcheng and "
        "Karampatziakis, Nikos and Chen, Weizhu and Zhao, Tuo",
        2023,
        "2310.08659",
    ),
    "qlora": Paper(
        "dettmers2023qlora",
        "{QLoRA}: Efficient Finetuning of Quantized {LLM}s",
        "Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke",
        2023,
        "2305.14314",
    ),
    "lora_plus": Paper(
        "hayou2024loraplus",
        "{LoRA+}: Efficient Low Rank Adaptation of Large Models",
        "Hayou, Soufiane and Ghosh, Nikhil and Yu, Bin",
        2024,
        "2402.12354",
    ),
    "lora_fa": Paper(
        "zhang2023lorafa",
        "{LoRA-FA}: Memory-efficient Low-rank Adaptation for Large Language Models "
        "Fine-tuning",
        "Zhang, Longteng and Zhang, Lin and Shi, Shaohuai and Chu, Xiaowen and Li, Bo",
        2023,
        "2308.03303",
    ),
    "riemannian": Paper(
        "zhang2024riemannian",
        "Riemannian Preconditioned {LoRA} for Fine-Tuning Foundation Models",
        "Zhang, Fangzhao and Pilanci, Mert",
        2024,
        "2402.02347",
    ),
}

# Methods and inits without a paper of their own.
WITHOUT_PAPER = ("kaiming", "gaussian", "orthogonal", "rows")


def cite(used: LoraConfig | Plan, *also: str) -> str:
    """Returns the BibTeX entries of the papers behind a config or a plan.

    LoRA comes first, then the methods, scale and inits in use, each once. A config uses
    all that it and its rules name; a plan uses only what its weights use.

    Args:
      used: a config, or the plan made from it.
      *also: names that a config does not hold, such as the optimizers `"lora_plus"`,
        `"lora_fa"` and `"riemannian"`.

    Raises:
      ConfigError: if a name of `also` is unknown; lists the known ones.

    Examples:
      >>> import jlora
      >>> print(jlora.cite(jlora.LoraConfig(rslora=True)))
      @misc{hu2021lora,
        title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
        author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and ...},
        year = {2021},
        eprint = {2106.09685},
        archivePrefix = {arXiv},
        url = {https://arxiv.org/abs/2106.09685}
      }
      <BLANKLINE>
      @misc{kalajdzievski2023rslora,
        title = {A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}},
        author = {Kalajdzievski, Damjan},
        year = {2023},
        eprint = {2312.03732},
        archivePrefix = {arXiv},
        url = {https://arxiv.org/abs/2312.03732}
      }
    """
    unknown = [name for name in also if name not in PAPERS]
    if unknown:
        raise ConfigError(
            f"No paper is known for {listed(map(repr, unknown), 10, ', ')}. Known "
            f"names: {', '.join(PAPERS)}."
        )
    names = dict.fromkeys(("lora", *_names(used), *also))
    return "\n\n".join(_bibtex(PAPERS[name]) for name in names if name in PAPERS)


def _names(used: LoraConfig | Plan) -> list[str]:
    """Returns the methods, the scale, the storage and the inits in use."""
    if isinstance(used, Plan):
        specs = [row.spec for row in used.rows() if row.spec is not None]
        is_rank_stabilised = any(spec.rslora for spec in specs)
        is_quantised = any(row.storage in ("nf4", "int4") for row in used.rows())
        config = used.config
    else:
        specs = [used, *used.rules]
        is_rank_stabilised = used.rslora
        is_quantised = False
        config = used
    names = [spec.method for spec in specs]
    names += ["alora"] if config.invocation else []
    names += ["rslora"] if is_rank_stabilised else []
    names += ["qlora"] if is_quantised else []
    inits = [spec.init for spec in specs]
    return names + [entry_of(init) for init in inits if isinstance(init, str)]


def entry_of(name: str) -> str:
    """Returns the name in `PAPERS` of a method or init.

    Args:
      name: of a method or init, as in `LoraConfig`.

    Examples:
      >>> entry_of("lora_ga"), entry_of("pissa_niter_4")
      ('lora_ga', 'pissa')
    """
    return name if name in PAPERS else name.split("_")[0]


def _bibtex(paper: Paper) -> str:
    fields = {
        "title": paper.title,
        "author": paper.authors,
        "year": paper.year,
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{paper.arxiv}",
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{paper.key},\n{lines}\n}}"
