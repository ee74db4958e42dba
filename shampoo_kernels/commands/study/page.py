"""The page: everything that the stored runs say, in one file of HTML without anything outside."""

import base64
import html
import statistics
from collections.abc import Iterable
from typing import Any

import torch

import shampoo_kernels
from shampoo_kernels.commands.study.plots import Runs
from shampoo_kernels.commands.study.runs import VIEWS
from shampoo_kernels.commands.study.settings import Setting, describe
from shampoo_kernels.commands.study.verdicts import Claim
from shampoo_kernels.study import NAMES

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block;
        overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.5rem; text-align: left;
         vertical-align: top; }
th.number, td.number, td.text { font-size: 0.8rem; padding: 0.25rem 0.35rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td.text { white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.yes { color: #00664d; } .no { color: #a33a00; } .partly { color: #1a1a1a; }
small, figcaption { color: #444; } figure { margin: 1rem 0; } code { background: #f2f2f2; }
"""

WHAT = """
<p>Shampoo is an optimizer. For a layer with a weight matrix of m × n it does not scale every entry
of the gradient by itself, as Adam does, but multiplies it by matrices that adapt to how the
gradients of the layer vary. The ideal matrix for that is <b>H = E[g gᵀ]</b>, where g is the
gradient G of the layer written as one long vector: (mn)² numbers, too many to keep. So H is
approximated by a <b>Kronecker product</b> R ⊗ L of an n × n and an m × m matrix. The question of
this page is how close such a product comes to H.</p>
<p>Closeness is measured by the <b>cosine</b> of the angle between both, seen as long vectors: 1
means equal up to a factor, 0 means nothing in common. H is never formed for this; the numbers come
from the gradients themselves and are, up to rounding, exact for the H of these gradients.</p>
<p>H can mean two things. <b>Gauss–Newton</b>: the gradient of an example's loss with a label that
is drawn from the model's own prediction; this is the curvature that second-order methods want.
Here it is exact, the mean over all labels, on a fixed set of training examples. <b>Adagrad</b>:
the gradients of the training steps so far, as they came.</p>
<table>
<tr><th>name</th><th>what it is</th></tr>
<tr><td>optimal Kronecker</td><td>the best R ⊗ L there is, by power iteration to
convergence</td></tr>
<tr><td>Shampoo²</td><td>E[GGᵀ] and E[GᵀG] as they are</td></tr>
<tr><td>Shampoo</td><td>their square roots: what Shampoo was first derived from</td></tr>
<tr><td>K-FAC</td><td>the second moments of the layer's input and of the gradient at its output,
without the weights that tie them together; Gauss–Newton only</td></tr>
</table>
"""


def render(runs: Runs, claims: list[Claim], pictures: dict[str, bytes], left_out: list[str]) -> str:
    """The whole page; `pictures` by file name, `left_out` one sentence for each missing setting."""
    seeds = sorted({run["seed"] for found in runs.values() for run in found})
    parts = [
        "<h1>How good is Shampoo's Kronecker approximation?</h1>",
        "<p>The claims of Morwani et al., “A New Perspective on Shampoo's Preconditioner” "
        '(<a href="https://arxiv.org/abs/2406.17748">arXiv 2406.17748</a>), measured on '
        f"{len(runs)} settings with {len(seeds)} seeds each. Every number and every verdict here "
        "is computed from these runs.</p>",
        "<h2>What is measured</h2>",
        WHAT,
        "<h2>The claims</h2>",
        _claims([claim for claim in claims if claim.from_the_abstract]),
        "<h3>Also said in the paper</h3>",
        _claims([claim for claim in claims if not claim.from_the_abstract]),
        "<p><small>A case is one layer of one setting at one point of training. It counts as held "
        "where the rule is met in every seed, as failed where it is met in none, and as undecided "
        "where the seeds do not agree. The output layer of a classifier of two classes is exactly "
        "a Kronecker product by construction (see below) and is no case of a claim about "
        "closeness.</small></p>",
        "<h2>Along training</h2>",
        _figure("overview.png", pictures, "One layer of every setting. Lines: mean over the seeds; "
                "shaded: from the lowest to the highest seed. Where the optimum cannot be seen, "
                "Shampoo² lies on it."),
        _binary(runs),
        "<h2>Batch size and labels</h2>",
        "<p>Shampoo in training sees neither single examples nor labels drawn from the model: it "
        "sees the mean gradient of a batch, with the real labels. How close is Shampoo² made of "
        "such gradients to the exact Gauss–Newton matrix? For independent examples, "
        "B E[G<sub>B</sub>G<sub>B</sub>ᵀ] = E[GGᵀ] + (B − 1) E[G] E[G]ᵀ. With labels of the "
        "model E[G] = 0, so that the batch size makes no difference in the mean. With real labels "
        "the last term grows with B.</p>",
        _figure("tricks.png", pictures, "Points: statistics of a fixed number of batches; bars: "
                "from the lowest to the highest seed. Dashed: what infinitely many batches would "
                "give; the points differ from it by their number alone."),
        "<h2>Every approximation, after training</h2>",
        "<p>Mean ± standard deviation over the seeds. q = 1/2 and KL are the fixed points of other "
        "divergences than the Frobenius norm, whose optimum is the one above: they are not meant "
        "to win here. “Best diagonal” corrects the eigenvalues in the eigenbasis of Shampoo², "
        "EKFAC in that of K-FAC. The bound is the cosine that σ<sub>1</sub>, σ<sub>2</sub> and the "
        "traces of the leading factors promise for Shampoo². A star: the iteration still moved "
        "when it was stopped, in one seed or more.</p>",
        *(_table_of_all(view, runs) for view in VIEWS),
        "<h2>The settings</h2>",
        *(f"<p><b>Left out:</b> {html.escape(sentence)}</p>" for sentence in left_out),
    ]  # fmt: skip
    for setting, found in runs.items():
        parts += _setting(setting, found, pictures)
    parts.append(
        f"<p><small>shampoo_kernels {shampoo_kernels.__version__}, torch {torch.__version__}; "
        f"seeds {', '.join(map(str, seeds))}. The numbers are in measurements.csv and tricks.csv "
        "beside this page.</small></p>"
    )
    title = "Shampoo's Kronecker approximation, measured"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _claims(claims: list[Claim]) -> str:
    rows = []
    for claim in claims:
        kind = {"holds": "yes", "does not hold here": "no"}.get(claim.verdict, "partly")
        rows.append(
            f"<tr><td>{html.escape(claim.sentence)}<br><small>Rule: {html.escape(claim.rule)}."
            f'</small></td><td class="verdict {kind}">{claim.verdict}</td>'
            f"<td>{html.escape(claim.measured)}</td></tr>"
        )
    head = "<tr><th>claim</th><th>here</th><th>measured</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _binary(runs: Runs) -> str:
    """What is known beforehand about two classes and one linear layer, with what was measured."""
    found = [
        (s.name, row[f"cosine_{name}"])
        for s, all_of in runs.items()
        if len(s.classes) == 2 and s.model == "logistic regression"
        for run in all_of
        for row in run["rows"]
        if row["view"] == "gauss_newton"
        for name in ("optimal", "shampoo_squared")
    ]
    if not found:
        return ""
    names = ", ".join(dict.fromkeys(name for name, _ in found))
    return (
        "<p>A classifier of two classes with one linear layer is a special case, and so is the "
        "output layer of any other: the gradient of an example is the vector (1, −1) times a "
        "number times the input, so H is exactly a Kronecker product, and the optimum and Shampoo² "
        f"must have cosine 1. Measured in {html.escape(names)}: lowest "
        f"{min(value for _, value in found):.12f}.</p>"
    )


def _table_of_all(view: str, runs: Runs) -> str:
    hidden = {"two_steps"} | ({"kfac", "ekfac"} if view == "adagrad" else set())
    names = [name for name in NAMES if name not in hidden]
    short = NAMES | {"corrected": "best diagonal", "three_steps": "three steps"}
    head = ["setting", "layer", "m × n", *(short[name] for name in names), "bound", "σ₂/σ₁"]
    rows = []
    for setting, found in runs.items():
        for layer in setting.layers:
            ends = [
                row
                for run in found
                for row in run["rows"]
                if (row["view"], row["layer"]) == (view, layer) and "bound" in row
            ]
            if ends:
                cells = [mean_and_spread([row.get(f"cosine_{name}") for row in ends])
                         + unsettled(name, ends) for name in names]  # fmt: skip
                bound = mean_and_spread([row["bound"] for row in ends])
                cells.append(bound + unsettled("spectrum", ends))
                cells.append(mean_and_spread([row["sigma2"] / row["sigma1"] for row in ends]))
                shape = f"{ends[0]['m']} × {ends[0]['n']}"
                rows.append([setting.name, layer, shape, *cells])
    return f"<h3>{VIEWS[view]} view</h3>" + _table(head, rows, texts=3)


def unsettled(name: str, rows: list[dict[str, Any]]) -> str:
    """A star where an iteration stopped before it had settled, in any seed."""
    return "" if all(row.get(f"converged_{name}", True) for row in rows) else " *"


def mean_and_spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.fmean(known):.3f}"
    return text if len(known) == 1 else f"{text} ± {statistics.stdev(known):.3f}"


def _setting(
    setting: Setting, found: list[dict[str, Any]], pictures: dict[str, bytes]
) -> list[str]:
    ends = [run["curve"][-1] for run in found]
    return [
        f"<h3>{html.escape(setting.name)}: {html.escape(describe(setting, found[0]['data']))}</h3>",
        f"<p>{found[0]['training_images']} training images; AdamW, learning rate {setting.lr:g}, "
        f"{setting.steps} steps of {setting.batch_size}; Gauss–Newton over {setting.examples} "
        f"training examples and {len(setting.classes)} labels, exactly; {setting.batches} "
        "gradients for each batch size. After training: validation loss "
        f"{mean_and_spread([end['loss'] for end in ends])}, accuracy "
        f"{mean_and_spread([end['accuracy'] for end in ends])}.</p>",
        _figure(f"{setting.name}.png", pictures, "All measured layers. As above: mean over the "
                "seeds, lowest to highest shaded."),
    ]  # fmt: skip


def _figure(name: str, pictures: dict[str, bytes], caption: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(head: Iterable[str], rows: Iterable[list[str]], texts: int) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        made = []
        for i, cell in enumerate(cells):
            mean, _, spread = html.escape(cell).partition(" ± ")
            kind, below = "number" if i >= texts else "text", f"<br><small>± {spread}</small>"
            made.append(f'<{tag} class="{kind}">{mean}{below if spread else ""}</{tag}>')
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
