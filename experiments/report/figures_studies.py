"""Figures of the studies, each from its results/studies/NAME.json alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import NullFormatter

from experiments.report.figure import COLOURS, GRID, INK, STYLE, Figure, save

WIDTH = 6.6  # inches, the same for every figure so that their text has one size on the page

Json = dict[str, Any]


def draw(results_dir: Path, figures_dir: Path) -> list[Figure]:
    """All figures that ``results_dir`` has a study for."""
    figures: list[Figure] = []
    with matplotlib.rc_context(STYLE):
        for study, drawings in _DRAWINGS.items():
            path = results_dir / "studies" / f"{study}.json"
            if path.exists():
                document: Json = json.loads(path.read_text(encoding="utf-8"))
                for name, make in drawings.items():
                    drawing, title, sentence = make(document["results"], document["settings"])
                    figures.append(save(drawing, figures_dir, name, title, sentence))
    return figures


Drawn = tuple[Drawing, str, str]  # and its title and sentence

# Rosenbrock

_PATHS = {
    "adam": ("Adam", COLOURS["Adam"]),
    "topk": ("Top-K alone", COLOURS["SGD"]),
    "topk_ef": ("Error feedback", COLOURS["Adafactor"]),
    "topk_ef_4bit": ("4-bit error feedback", COLOURS["CAME"]),
    "microadam_small_lr": ("MicroAdam", COLOURS["MicroAdam"]),
    "microadam": ("MicroAdam", COLOURS["MicroAdam"]),
}


def _rosenbrock(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 7.9))
    axes = drawing.subplots(3, 2)
    runs = results["plane"]
    shown = ("adam", "topk", "topk_ef", "microadam_small_lr", "microadam")
    for ax, method in zip(axes.flat, shown, strict=False):
        label, colour = _PATHS[method]
        factor = settings["microadam_lr_factor"]
        rate = settings["lr"] * (factor if method == "microadam_small_lr" else 1)
        _contour(ax)
        for run in runs:
            x, y = np.array(run["path"]).T
            if run["method"] == "adam" and method != "adam":
                ax.plot(x, y, color=INK, linewidth=1, linestyle=(0, (3, 2)), zorder=4)
            if run["method"] == method:
                ax.plot(x, y, color=colour, linewidth=1.7, zorder=3)
                ax.plot(*run["start"], "o", color=colour, markersize=6, zorder=5)
        ax.plot(1, 1, "*", color=INK, markersize=13, zorder=6)
        ax.set_title(label, loc="left")
        ax.set_title(f"learning rate {rate:g}", loc="right", fontweight="normal", fontsize=9)
    ax = axes.flat[-1]
    methods = shown[1:]
    strays = {m: max(r["distance_from_adam"] for r in runs if r["method"] == m) for m in methods}
    small_lr = settings["lr"] * settings["microadam_lr_factor"]
    labels = [
        "Top-K\nalone",
        "Error\nfeedback",
        f"MicroAdam\nat {small_lr:g}",
        f"MicroAdam\nat {settings['lr']:g}",
    ]
    bars = ax.bar(labels, list(strays.values()), color=[_PATHS[m][1] for m in methods], width=0.65)
    ax.bar_label(bars, fmt="%.2f", padding=2, color=INK)
    ax.tick_params(axis="x", labelsize=8.5)
    ax.set_title("Farthest from Adam's paths", loc="left")
    ax.grid(axis="x", visible=False)
    ax.margins(y=0.15)
    sentence = (
        f"Top-K alone strays up to {strays['topk']:.2f} from Adam's paths (dashed); error feedback "
        f"{'brings it back to' if strays['topk_ef'] < strays['topk'] else 'does not help:'} "
        f"{strays['topk_ef']:.2f}. MicroAdam strays {strays['microadam_small_lr']:.2f} at "
        f"{settings['microadam_lr_factor']:g} of Adam's learning rate and "
        f"{strays['microadam']:.2f} at all of it: its second moment forgets after "
        "10 steps, so its steps do not shrink in the valley."
    )
    return drawing, "Rosenbrock: Top-K, error feedback and MicroAdam", sentence


def _contour(ax: Axes) -> None:
    x, y = np.meshgrid(np.linspace(-1.9, 1.6, 80), np.linspace(-0.9, 2.1, 80))
    loss = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    # Not np.logspace, whose last digits, and with them the figure, depend on the CPU.
    levels = [10 ** (0.75 * i) for i in range(5)]
    ax.contour(x, y, loss, levels=levels, colors="#b8c2d0", linewidths=0.8)
    ax.set(xlim=(-1.9, 1.6), ylim=(-0.9, 2.1))
    ax.grid(visible=False)


def _rosenbrock_large(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 3.9))
    axes = drawing.subplots(1, len(settings["densities"]), sharey=True, squeeze=False)[0]
    losses = {(run["method"], run["density"]): run["losses"] for run in results["large"]}
    steps = [step + 1 for step in results["large_steps"]]
    small_lr = settings["large_lr"] * settings["microadam_lr_factor"]
    gaps = []
    for ax, density in zip(axes, settings["densities"], strict=True):
        for method in ("adam", "topk", "topk_ef", "topk_ef_4bit", "microadam_small_lr"):
            label, colour = _PATHS[method]
            if method == "microadam_small_lr":
                label += f" at {small_lr:g}"
            style = (0, (2, 2)) if method == "topk_ef_4bit" else "-"
            curve = losses[method, density]
            ax.plot(steps, curve, color=colour, linestyle=style, linewidth=2, label=label)
        pairs = zip(losses["topk_ef", density], losses["topk_ef_4bit", density], strict=True)
        gaps.append(max(abs(b / a - 1) for a, b in pairs))
        ax.set(xscale="log", yscale="log", title=f"density {density:g}", xlabel="step")
    axes[0].set_ylabel("loss")
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    density = settings["densities"][-1]
    last = ", ".join(
        f"{_PATHS[method][0]} {losses[method, density][-1]:.3g}"
        for method in ("adam", "topk", "topk_ef", "microadam")
    )
    sentence = (
        f"With {settings['num_variables']} variables, the loss with 4-bit error feedback is never "
        f"farther than {max(gaps):.0%} from that with exact error feedback. Last losses at a "
        f"density of {density:g} and a learning rate of {settings['large_lr']:g}: {last}, and "
        f"MicroAdam at {small_lr:g} {losses['microadam_small_lr', density][-1]:.3g}."
    )
    return drawing, "Rosenbrock of many variables: 4-bit and exact error feedback", sentence


# Convergence

_CONVERGENCE = {
    "amsgrad": ("AMSGrad", COLOURS["Adam"], "o"),
    "analysed": ("MicroAdam as analysed", COLOURS["CAME"], "s"),
    "microadam": ("MicroAdam as shipped", COLOURS["MicroAdam"], "D"),
}
_PROBLEMS = {
    "nonconvex": ("Non-convex", r"mean $\|\nabla f\|^2$", r"$T^{-1/2}$"),
    "pl": ("PL condition", r"$f(x_T) - f^*$", r"$T^{-1} \log T$"),
}


def _convergence(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 5))
    axes = drawing.subplots(1, 2)
    found = []
    for ax, (problem, (title, quantity, rate)) in zip(axes, _PROBLEMS.items(), strict=True):
        curves = [curve for curve in results["curves"] if curve["problem"] == problem]
        num_steps = settings["num_steps"]
        for curve in curves:
            label, colour, marker = _CONVERGENCE[curve["method"]]
            values = np.array(curve["values"])
            exponent, spread = _mean_std(curve["exponents"])
            ax.plot(
                num_steps,
                values.mean(axis=1),
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=2,
                label=f"{label}: {exponent:.2f} ± {spread:.2f}",
            )
            ax.fill_between(
                num_steps, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, lw=0
            )
            found.append((problem, label, exponent))
        proved = np.array(curves[0]["rates"])
        lowest = min(float(np.mean(curve["values"][-1])) for curve in curves)
        ax.plot(
            num_steps,
            proved * lowest / proved[-1] * 0.6,
            color=INK,
            linestyle=(0, (4, 3)),
            linewidth=1.4,
            label=f"proved rate {rate}: 1",
        )
        ax.set(xscale="log", yscale="log", title=title, xlabel="steps T", ylabel=quantity)
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(title="power of the proved rate", loc="upper center", bbox_to_anchor=(0.5, -0.17))
    parts = []
    for problem, (title, _, _) in _PROBLEMS.items():
        powers = ", ".join(f"{label} {power:.2f}" for p, label, power in found if p == problem)
        curves = [curve for curve in results["curves"] if curve["problem"] == problem]
        last = {curve["method"]: np.mean(curve["values"][-1]) for curve in curves}
        parts.append(
            f"{title}: {powers}, and after {settings['num_steps'][-1]} steps MicroAdam as shipped "
            f"is at {last['microadam'] / last['amsgrad']:.1f} times AMSGrad's value"
        )
    sentence = (
        "Fitted power of the proved rate, 1 being exactly as proved and more being faster. "
        + "; ".join(parts)
        + f". Means of {settings['num_seeds']} seeds; the bands span them. {_at_the_edge(results)}"
    )
    return drawing, "Convergence against the proved rates", sentence


def _at_the_edge(results: Json) -> str:
    """Which methods might do better than shown."""
    edges = [
        f"{_CONVERGENCE[curve['method']][0]} ({_PROBLEMS[curve['problem']][0]})"
        for curve in results["curves"]
        if curve["is_factor_at_edge"]
    ]
    return f"Best step size at the edge of its grid: {', '.join(edges) or 'none'}."


# Ablations

_PARTS = {
    "bits": "bits of error feedback",
    "density": "density",
    "window_size": "window",
    "block_size": "block",
    "bucket_size": "bucket",
    "bias_correction": "bias correction",
}


def _ablations(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 8.6))
    axes = drawing.subplots(3, 2, sharey=True)
    by_part: dict[str, list[Json]] = {part: [] for part in ("adam", "baseline", *_PARTS)}
    for variant in results["variants"]:
        by_part[variant["part"]].append(variant)
    (adam,), (baseline,) = by_part["adam"], by_part["baseline"]
    for ax, (part, title) in zip(axes.flat, _PARTS.items(), strict=True):
        own = {_key(v["value"]): v for v in by_part[part]}
        own[_key(results["baseline"][part])] = baseline
        # In the order of the settings, without variants that were not run.
        values = [value for value in settings["parts"][part] if _key(value) in own]
        mean, std = _mean_std(adam["losses"])
        ax.axhspan(mean - std, mean + std, color=COLOURS["Adam"], alpha=0.25, lw=0)
        ax.axhline(mean, color=COLOURS["Adam"], linewidth=1.4)
        for place, value in enumerate(values):
            variant = own[_key(value)]
            mean, std = _mean_std(variant["losses"])
            is_default = variant is baseline
            ax.errorbar(
                place,
                mean,
                yerr=std,
                marker="D" if is_default else "o",
                markersize=9 if is_default else 7,
                color=COLOURS["MicroAdam"] if is_default else INK,
                capsize=4,
                linewidth=1.6,
            )
        ax.set_xticks(
            range(len(values)),
            [
                f"{_value_name(part, v)}\n{own[_key(v)]['state_bytes_per_parameter']:.2f} B"
                for v in values
            ],
        )
        ax.tick_params(axis="x", labelsize=8.5)
        ax.set_title(title, loc="left")
        ax.grid(axis="x", visible=False)
        ax.set_xlim(-0.6, len(values) - 0.4)
    for ax in axes[:, 0]:
        ax.set_ylabel("final training loss")
    axes[0, 0].annotate(
        "Adam, 8 B",
        (0.3, statistics.mean(adam["losses"])),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=COLOURS["Adam"],
    )
    return drawing, "What each part of MicroAdam is worth", _ablation_sentence(by_part)


def _ablation_sentence(by_part: dict[str, list[Json]]) -> str:
    adam = statistics.mean(by_part["adam"][0]["losses"])
    default, spread = _mean_std(by_part["baseline"][0]["losses"])
    others = [
        (statistics.mean(variant["losses"]) - default, part, variant)
        for part in _PARTS
        for variant in by_part[part]
    ]

    def name(part: str, variant: Json) -> str:
        return f"{_PARTS[part]} {_value_name(part, variant['value'])}"

    variants = [variant for part in by_part.values() for variant in part]
    num_at_edge = sum(variant["is_lr_at_edge"] for variant in variants)
    worst, best = max(others, key=lambda o: o[0]), min(others, key=lambda o: o[0])
    own_bytes = by_part["baseline"][0]["state_bytes_per_parameter"]
    no_larger = [o for o in others if o[2]["state_bytes_per_parameter"] <= own_bytes]
    best_no_larger = min(no_larger, key=lambda o: o[0])
    quiet = [name(part, variant) for gap, part, variant in others if abs(gap) <= spread]
    relation = "behind" if default > adam else "ahead of"
    return (
        f"MicroAdam's defaults (diamonds) end at a loss of {default:.3f} ± {spread:.3f}, "
        f"{abs(default - adam):.3f} {relation} Adam's {adam:.3f}. The change that hurts most is "
        f"{name(*worst[1:])} ({worst[0]:+.3f}), the one that helps most {name(*best[1:])} "
        f"({best[0]:+.3f}, {best[2]['state_bytes_per_parameter']:.2f} bytes a parameter), in no "
        f"more than the default's {own_bytes:.2f} bytes {name(*best_no_larger[1:])} "
        f"({best_no_larger[0]:+.3f}, {best_no_larger[2]['state_bytes_per_parameter']:.2f}); "
        f"within the spread of the seeds: {', '.join(quiet) or 'none'}. {num_at_edge} of "
        f"{len(variants)} had their best learning rate at the edge of the grid and may do better."
    )


def _key(value: Any) -> str:
    return json.dumps(value)


def _value_name(part: str, value: Any) -> str:
    if part == "bits" and not value:
        return "exact" if value is None else "none"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


# Compressor

_KIND_COLOURS = {
    "all": INK,
    "embeddings": COLOURS["Adam"],
    "attention": COLOURS["Adafactor"],
    "feed-forward": COLOURS["MicroAdam"],
    "head": COLOURS["CAME"],
    "biases and norms": COLOURS["GaLore"],
}


def _compressor(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 6.4))
    axes = drawing.subplots(2, len(results["runs"]), sharey="row", squeeze=False)
    measured = {k for run in results["runs"] for m in run["measurements"] for k in m["kinds"]}
    kinds = [kind for kind in _KIND_COLOURS if kind in measured]
    found = []
    for (top, bottom), run in zip(axes.T, results["runs"], strict=True):
        measurements = run["measurements"]
        steps = [m["step"] for m in measurements]
        last = measurements[-1]["kinds"]
        own = [kind for kind in kinds if kind in last]
        for kind in own:
            top.plot(
                steps,
                [m["kinds"][kind]["condition"] for m in measurements],
                color=_KIND_COLOURS[kind],
                marker="o",
                markersize=4,
                linewidth=3 if kind == "all" else 1.8,
                label=kind,
            )
        top.axhline(1, color=INK, linestyle=(0, (4, 3)), linewidth=1.4)
        top.set(xscale="log", title=run["model"], xlabel="step")
        top.set_xticks(steps, [str(step) for step in steps])
        top.minorticks_off()
        for offset, part, letter, alpha in ((-0.2, "q", "q", 1.0), (0.2, "omega", "ω", 0.45)):
            bars = bottom.barh(
                [kinds.index(kind) + offset for kind in own],
                [last[kind][part] for kind in own],
                height=0.38,
                color=[_KIND_COLOURS[kind] for kind in own],
                alpha=alpha,
            )
            bottom.bar_label(bars, fmt=f"{letter} %.2f", padding=2, fontsize=8)
        bottom.set_yticks(range(len(kinds)), kinds)
        bottom.set(xlim=(0, 1.3), ylim=(len(kinds) - 0.5, -0.5), title=f"step {steps[-1]}")
        bottom.grid(axis="y", visible=False)
        found.append((run["model"], measurements))
    axes[0, 0].set_ylabel("(1 + ω) q")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    sentence = " ".join(_compressor_sentence(*each) for each in found)
    return drawing, "Does compression satisfy the theorems' condition (1 + ω) q < 1?", sentence


def _compressor_sentence(model: str, measurements: list[Json]) -> str:
    values = [m["kinds"]["all"]["condition"] for m in measurements]
    stochastic = [m["kinds"]["all"]["stochastic_condition"] for m in measurements]
    last = measurements[-1]["kinds"]
    failing = [kind for kind, r in last.items() if kind != "all" and r["condition"] >= 1]
    num_met = sum(value < 1 for value in values)
    return (
        f"{model}: (1 + ω) q of the whole gradient is {min(values):.2f} to {max(values):.2f} and "
        f"below 1 at {num_met} of {len(values)} measured steps; with the unbiased rounding that "
        f"the theorems assume it is {min(stochastic):.2f} to {max(stochastic):.2f}. At step "
        f"{measurements[-1]['step']} it fails for {', '.join(failing) or 'no kind of layer'}."
    )


# GaLore's error


def _galore_error(results: Json, settings: Json) -> Drawn:
    drawing = Drawing(figsize=(WIDTH, 6.2))
    axes = drawing.subplots(2, 1, sharex=True, sharey=True)
    num_steps, gap = settings["num_steps"], settings["update_gap"]
    ratios = {}
    for ax, method, title in (
        (axes[0], "galore", f"GaLore, rank {settings['rank']}"),
        (axes[1], "microadam", "MicroAdam"),
    ):
        series = results[method]
        steps = range(1, num_steps + 1)
        colour = COLOURS["GaLore" if method == "galore" else "MicroAdam"]
        ax.plot(steps, series["error_norm"], color=colour, linewidth=2.4, label="error norm")
        ax.plot(steps, series["grad_norm"], color=INK, linewidth=1.2, label="gradient norm")
        ax.set(title=title, ylabel="norm", xlim=(1, num_steps))
        ax.legend(loc="upper left", ncols=2)
        pairs = zip(series["error_norm"], series["grad_norm"], strict=True)
        ratios[method] = [error / gradient for error, gradient in pairs]
    for start in range(0, num_steps, 2 * gap):
        axes[0].axvspan(start + 1, min(start + gap, num_steps) + 1, color=GRID, alpha=0.6, lw=0)
    highest = max(max(results[m][norm]) for m in ratios for norm in ("error_norm", "grad_norm"))
    axes[1].set(xlabel="step; shaded: every other subspace of GaLore", ylim=(0, 1.25 * highest))
    quarter = num_steps // 4
    parts = []
    for method, name in (("galore", "GaLore"), ("microadam", "MicroAdam")):
        early = statistics.mean(ratios[method][:quarter])
        late = statistics.mean(ratios[method][-quarter:])
        parts.append(f"{name}'s from {early:.2f} to {late:.2f}")
    sentence = (
        "Error norm over gradient norm, mean of the first and of the last quarter of the steps: "
        f"{', '.join(parts)}. {_within_subspaces(results['galore']['error_norm'], gap)}"
    )
    return drawing, "What error feedback has to carry: GaLore and MicroAdam", sentence


def _within_subspaces(errors: Sequence[float], gap: int) -> str:
    """How much GaLore's error grows while a subspace stays."""
    starts = range(0, len(errors) - gap + 1, gap)
    # The first subspace is fitted to the gradient of step 1 itself, which leaves next to no error.
    growth = [errors[start + gap - 1] / errors[start] for start in starts[1:]]
    grows = sum(a < b for a, b in pairwise(errors)) / (len(errors) - 1)
    if not growth:
        return f"GaLore's error grows in {grows:.0%} of all steps."
    return (
        f"From one subspace update to the next, the first apart, GaLore's error grows "
        f"{min(growth):.1f} to {max(growth):.1f} times; it grows in {grows:.0%} of all steps."
    )


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Over the finite values; infinite if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.mean(finite) if finite else math.inf
    return mean, statistics.stdev(finite) if len(finite) > 1 else 0.0


_DRAWINGS: dict[str, dict[str, Callable[[Json, Json], Drawn]]] = {
    "rosenbrock": {"rosenbrock": _rosenbrock, "rosenbrock_large": _rosenbrock_large},
    "galore_error": {"galore_error": _galore_error},
    "compressor": {"compressor": _compressor},
    "convergence": {"convergence": _convergence},
    "ablations": {"ablations": _ablations},
}
