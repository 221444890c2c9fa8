"""What the quality benchmark prints and draws, from its JSON alone: one table over all data sets, curves, costs.

In: `benchmarks/results/quality-<data>.json`. Out: Markdown on the screen, and pictures beside the JSON. Differences to
altmoe are paired: of the splits that both methods have.
"""

import numpy as np

from benchmarks.common import RESULTS, read_results, standard_error
from benchmarks.data_sets import plain_name
from trainer.evaluation import VARIANTS
from trainer.plotting import pyplot

BEST = list(VARIANTS)[-1]
NAMES = {
    "altmoe": "altmoe (default recipe)",
    "paper": "the paper's plain configuration",
    "kernel_ridge": "kernel ridge",
    "cca": "CCA",
    "asif": "ASIF",
    "linear_infonce": "linear + InfoNCE (CLIP / LiT head)",
    "mlp_infonce": "MLP + InfoNCE",
    "sail": "GLU + sigmoid (SAIL)",
    "authors_published": "the authors' predictor, joint (as published)",
    "authors_alternating": "the authors' predictor, alternating (as described)",
}


def figures(results: dict, size: str, pair: str, method: str) -> dict[str, dict]:
    """`{split: figures}` of one method."""
    return {seed: split[pair][method] for seed, split in results.get(size, {}).items() if method in split.get(pair, {})}


def recall(of: dict, variant: str = BEST) -> np.ndarray:
    """Mean recall in percent, one value a split."""
    return np.array([100 * of[seed][variant]["mean_recall"] for seed in sorted(of)])


def _text(values, sign: str = "") -> str:
    values = np.asarray(list(values), dtype=float)
    if not len(values):
        return "-"
    return f"{values.mean():{sign}.1f}" + (f" ± {standard_error(values):.1f}" if len(values) > 1 else "")


def lead(results: dict, size: str, pair: str, method: str, variant: str = BEST) -> np.ndarray:
    """A method's mean recall minus altmoe's, of the splits that both have."""
    return _over(figures(results, size, pair, method), figures(results, size, pair, "altmoe"), variant)


def _pairs(results: dict) -> list[str]:
    return sorted({pair for splits in results.values() for split in splits.values() for pair in split})


def main_table(found: dict[str, dict], methods: list[str]) -> str:
    """One table: a row a method, two columns a data set (and pair of modalities)."""
    places = [(data, pair) for data, results in found.items() for pair in _pairs(results)]
    heads = [data if len(_pairs(found[data])) == 1 else f"{data} {pair}" for data, pair in places]
    lines = ["| method | " + " | ".join(f"{head} | against altmoe" for head in heads) + " |"]
    lines.append("|---" * (1 + 2 * len(places)) + "|")
    rows = []
    for method in methods:
        cells, order = [], []
        for data, pair in places:
            values = recall(figures(found[data], "all", pair, method))
            difference = lead(found[data], "all", pair, method)
            count = f" ({len(values)} split{'s' if len(values) > 1 else ''})" if len(values) else ""
            cells += [_text(values) + count, "" if method == "altmoe" else _text(difference, "+")]
            order += [difference.mean()] if len(difference) else []
        if any(cell not in ("", "-") for cell in cells):
            rows.append((np.mean(order), f"| {NAMES.get(method, method)} | " + " | ".join(cells) + " |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows, key=lambda row: -row[0]))])


def layers_table(found: dict[str, dict]) -> str:
    """Latents of several layers beside the encoders' outputs, a row a data set and size; empty if nothing is of several.

    Leads are paired by split, over the best other method there is: on the outputs, and on the same latents.
    """
    lines = []
    for data, results in found.items():
        plain, wider = plain_name(data)
        outputs = read_results(RESULTS / f"quality-{plain}.json", "sizes") if wider else {}
        for pair in _pairs(results) if outputs else []:
            for size in _sizes(results, pair):
                ours = figures(results, size, pair, "altmoe")
                cells = [f"{data}, {_rows(results, size, pair):.0f} pairs"]
                for where in (outputs, results):
                    cells += [_text(recall(figures(where, size, pair, m))) for m in ("kernel_ridge", "altmoe")]
                for where in (outputs, results):
                    leads = {m: _over(ours, figures(where, size, pair, m)) for m in _others(where, size, pair)}
                    best = min((m for m in leads if len(leads[m])), key=lambda m: leads[m].mean(), default=None)
                    cells.append(f"{_text(leads[best], '+')} ({NAMES.get(best, best)})" if best else "-")
                lines.append("| " + " | ".join(cells) + " |")
    head = (
        "| data | kernel ridge, outputs | altmoe, outputs | kernel ridge, several layers | altmoe, several layers | "
        "altmoe, several layers, over the best other on outputs | over the best other on the same latents |"
    )
    return "\n".join([head, "|---" * 7 + "|", *lines]) if lines else ""


def _others(results: dict, size: str, pair: str) -> list[str]:
    return sorted({m for split in results.get(size, {}).values() for m in split.get(pair, {})} - {"altmoe"})


def _over(one: dict, other: dict, variant: str = BEST) -> np.ndarray:
    """How much better one is than the other, of the splits that both have."""
    both = sorted(one.keys() & other.keys())
    return recall({s: one[s] for s in both}, variant) - recall({s: other[s] for s in both}, variant)


def detail_table(results: dict, pair: str, methods: list[str], size: str = "all") -> str:
    """One data set and pair: post-processing step by step, and recall at 1 and 10 of both directions."""
    directions = ["->".join(pair.split("<->")), "->".join(pair.split("<->")[::-1])]
    names = [name.replace("_", " ") for name in VARIANTS]
    names += [f"{direction} R@{k}" for direction in directions for k in (1, 10)]
    lines = ["| method | " + " | ".join([*names, "fit, CPU s"]) + " |", "|---" * (len(names) + 2) + "|"]
    for method in methods:
        of = figures(results, size, pair, method)
        if not of:
            continue
        cells = [_text(recall(of, variant)) for variant in VARIANTS]
        for direction in directions:
            for k in (1, 10):
                cells.append(
                    _text(100 * m[BEST][direction][f"recall@{k}"] for m in of.values() if direction in m[BEST])
                )
        cost = _seconds(of)
        cells.append(f"{np.mean(cost):.1f}" if cost else "-")
        lines.append(f"| {NAMES.get(method, method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(of: dict) -> list[float]:
    """Seconds of one core that a fit took with all of its search; not of what was measured on a GPU."""
    return [m["cpu_seconds"] for m in of.values() if "cpu_seconds" in m and m.get("device", "cpu") == "cpu"]


def curve_table(results: dict, pair: str, methods: list[str]) -> str:
    """Mean recall at every number of training pairs, and the best other method's paired lead over altmoe."""
    sizes = _sizes(results, pair)
    lines = ["| method | " + " | ".join(f"{_rows(results, size, pair):.0f} pairs" for size in sizes) + " |"]
    lines.append("|---" * (1 + len(sizes)) + "|")
    for method in methods:
        values = [recall(figures(results, size, pair, method)) for size in sizes]
        if any(map(len, values)):
            lines.append(f"| {NAMES.get(method, method)} | " + " | ".join(map(_text, values)) + " |")
    best = []
    for size in sizes:
        leads = {m: lead(results, size, pair, m) for m in methods if m != "altmoe"}
        leads = {m: values for m, values in leads.items() if len(values)}
        name = max(leads, key=lambda m: leads[m].mean(), default=None)
        best.append(
            f"{name.replace('_', ' ')} {leads[name].mean():+.1f} ± {standard_error(leads[name]):.1f}" if name else "-"
        )
    return "\n".join([*lines, "| *best other, against altmoe* | " + " | ".join(best) + " |"])


def _sizes(results: dict, pair: str) -> list[str]:
    """Sizes that altmoe has figures of, least first."""
    found = [size for size in results if figures(results, size, pair, "altmoe")]
    return sorted(found, key=lambda size: _rows(results, size, pair))


def _rows(results: dict, size: str, pair: str) -> float:
    """Mean number of training pairs."""
    return float(np.mean([m["training_rows"] for m in figures(results, size, pair, "altmoe").values()]))


def confidence_table(results: dict, pair: str) -> str:
    """Coverage, precision and calibration of altmoe, by direction."""
    of = figures(results, "all", pair, "altmoe")
    names = ("coverage", "precision", "false_alarms", "auroc", "auroc_ceiling", "auroc_right", "calibration_error")
    directions = sorted({direction for m in of.values() for direction in m.get("confidence", {})})
    lines = [
        "| direction | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for direction in directions:
        measured = [m["confidence"][direction] for m in of.values() if direction in m.get("confidence", {})]
        cells = [_text(100 * m[name] for m in measured if name in m) for name in names]
        lines.append(f"| {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if directions else ""


def _style(method: str) -> dict:
    return {"color": "#1a6fb0", "linewidth": 2.5, "zorder": 3} if method == "altmoe" else {"linewidth": 1.2}


def draw_bars(results: dict, data: str, pair: str, methods: list[str], path) -> None:
    """A bar a method: mean recall with its standard error."""
    values = {method: recall(figures(results, "all", pair, method)) for method in methods}
    values = {method: v for method, v in values.items() if len(v)}
    order = sorted(values, key=lambda method: values[method].mean())
    figure, axis = pyplot().subplots(figsize=(7, 0.42 * len(order) + 1.2), layout="constrained")
    axis.barh(
        [f"{NAMES.get(m, m)} ({len(values[m])})" for m in order],
        [values[m].mean() for m in order],
        xerr=[standard_error(values[m]) for m in order],
        color=["#1a6fb0" if m == "altmoe" else "#b8bec4" for m in order],
        capsize=3,
    )
    axis.set_xlabel(f"mean recall on held-out concepts of {data}, %\n{pair}, ± standard error (number of splits)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def draw_curve(results: dict, data: str, pair: str, methods: list[str], path) -> None:
    """Mean recall against the number of training pairs, a line a method."""
    figure, axis = pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    for method in methods:
        points = []
        for size in results:
            of = figures(results, size, pair, method)
            if of:
                points.append((np.mean([m["training_rows"] for m in of.values()]), recall(of)))
        if points and method != "chance":
            points.sort(key=lambda point: point[0])
            means, errors = [v.mean() for _, v in points], [standard_error(v) for _, v in points]
            rows = [n for n, _ in points]
            axis.errorbar(
                rows, means, yerr=errors, label=NAMES.get(method, method), capsize=3, marker="o", **_style(method)
            )
    axis.set(
        xscale="log", xlabel="training pairs", ylabel=f"mean recall on held-out concepts of {data}, %\n± standard error"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def draw_costs(results: dict, data: str, pair: str, methods: list[str], path) -> bool:
    """Mean recall against what fitting and choosing took, a point a method; False if no cost is known."""
    figure, axis = pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    drawn = False
    for method in methods:
        of = figures(results, "all", pair, method)
        if (seconds := _seconds(of)) and method != "chance":
            values = recall(of)
            color = "#1a6fb0" if method == "altmoe" else "#555b61"
            axis.errorbar(np.mean(seconds), values.mean(), yerr=standard_error(values), fmt="o", color=color, capsize=3)
            axis.annotate(NAMES.get(method, method), (np.mean(seconds), values.mean()), xytext=(6, 3),
                          textcoords="offset points", fontsize=8, color=color)  # fmt: skip
            drawn = True
    axis.set(
        xscale="log", xlabel="seconds of one core for fitting and all of its search", ylabel=f"mean recall, {data}, %"
    )
    axis.spines[["top", "right"]].set_visible(False)
    if drawn:
        figure.savefig(path, dpi=100)
    return drawn


def show(names: list[str], methods: list[str]) -> None:
    """Print every table and draw every picture for which there are figures."""
    found = {data: read_results(RESULTS / f"quality-{data}.json", "sizes") for data in names}
    for data, results in found.items():
        pairs = _pairs(results)
        for pair in pairs:
            ending = data if len(pairs) == 1 else f"{data}-{pair.replace('<->', '-')}"
            if "all" in results:
                print(
                    f"\n{data}, {pair}, all training pairs ({_count(results, pair)}), mean recall in % ± standard error\n"
                )
                print(detail_table(results, pair, methods))
                if table := confidence_table(results, pair):
                    print("\naltmoe's confidence that the first result is a match, every second query without one, %\n")
                    print(table)
                draw_bars(results, data, pair, methods, RESULTS / f"quality-{ending}.png")
                draw_costs(results, data, pair, methods, RESULTS / f"seconds-{ending}.png")
            if list(results) != ["all"]:
                print(f"\n{data}, {pair}: mean recall by number of training pairs\n")
                print(curve_table(results, pair, methods))
                draw_curve(results, data, pair, methods, RESULTS / f"curve-{ending}.png")
    print("\nall data sets, all training pairs: mean recall of both directions in % (both-direction score, hubness")
    print("correction) ± standard error over splits by concept; differences paired by split\n")
    print(main_table(found, methods))
    if table := layers_table(found):
        print("\nlatents of several layers beside the encoders' outputs\n")
        print(table)


def _count(results: dict, pair: str) -> str:
    rows = [m["training_rows"] for split in results["all"].values() for m in split.get(pair, {}).values()]
    return f"{min(rows)} to {max(rows)}" if rows else "none"
