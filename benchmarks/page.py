"""What the sections of the performance page share."""

from . import common, growth, scale

COLORS = {
    common.FLOOR: "#64748b",
    common.STRICT: "#94a3b8",
    common.JLORA: "#ea580c",
    growth.ADDED: "#0d9488",
    scale.SPREAD: "#fb923c",
    scale.COPIED: "#9333ea",
    "side path, autodiff": "#2563eb",
    "merge on the fly": "#7c3aed",
    "full fine-tune": "#0f172a",
}


def markdown(columns: common.Columns, left: int = 1) -> str:
    """Returns a Markdown table, all columns but the first `left` set right."""
    head, lines = columns
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *lines))


def source(env: common.Figures) -> str:
    """Returns a sentence on where figures come from."""
    libtpu = f" with libtpu {env['libtpu']}" if "libtpu" in env else ""
    where = env["processor"] if env["device"] == "cpu" else env["device"]
    cores = f", {env['cores']} cores" if env["device"] == "cpu" else ""
    return (
        f"*JAX {env['jax']}{libtpu}, {where}{cores}, {env['date']}, "
        f"commit {env['commit']}.*\n"
    )


def picture(name: str, alt: str) -> str:
    """Returns a Markdown link to a plot."""
    return f"![{alt}](performance-{name}.svg)\n"
