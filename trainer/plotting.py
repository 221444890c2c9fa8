"""Plots: one place that asks matplotlib for a canvas without a screen."""

from pathlib import Path


def pyplot():
    """`matplotlib.pyplot`, drawing to files only; imported when something is drawn, because that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_confidence(figures: dict, path: Path) -> None:
    """Precision against coverage, a line a direction, with the model's own threshold.

    Args:
        figures: `{direction: measure_confidence(...)}`.
        path: the picture to write.
    """
    figure, axis = pyplot().subplots(figsize=(5.5, 4), layout="constrained")
    for direction, values in figures.items():
        coverage, precision = ([100 * point[name] for point in values["curve"]] for name in ("coverage", "precision"))
        (line,) = axis.plot(coverage, precision, label=direction)
        axis.plot(100 * values["coverage"], 100 * values["precision"], "o", color=line.get_color())
    axis.set(
        xlabel="coverage: queries with a match that are answered, %",
        ylabel="precision of all answers, %\n(every second query has no match)",
        xlim=(0, 101),
        ylim=(0, 101),
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="dot: the model's threshold")
    figure.savefig(path, dpi=100)
