"""Pictures of a training run and of what the experts learned."""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = (7.0, 3.4)
DPI = 90


def draw(work: Path, folder: Path):
    figures = json.loads((work / "figures.json").read_text())
    logs = {kind: list(csv.DictReader((work / kind / "log.csv").open())) for kind in ("moe", "dense")}
    column = lambda rows, name: [float(row[name]) for row in rows]

    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    for kind, colour in (("moe", "tab:blue"), ("dense", "tab:orange")):
        millions = [tokens / 1e6 for tokens in column(logs[kind], "tokens")]
        axes.plot(millions, column(logs[kind], "loss"), color=colour, alpha=0.35, label=f"{kind}, training")
        axes.plot(millions, column(logs[kind], "held_out_loss"), color=colour, label=f"{kind}, held out")
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(None, 5))
    axes.legend()
    figure.savefig(folder / "loss.png")

    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    millions = [tokens / 1e6 for tokens in column(logs["moe"], "tokens")]
    names = [name for name in logs["moe"][0] if name.startswith("load_")]
    num_layers = len(names)
    for name in names:
        layer = int(name.removeprefix("load_")) + 1
        axes.plot(millions, column(logs["moe"], name), label=f"layer {layer}" + (" (MTP)" if layer == num_layers else ""))
    axes.axhline(1.6, color="grey", linestyle=":")
    axes.set(xlabel="million tokens", ylabel="largest load of a batch / mean", ylim=(1, None))
    axes.legend(ncols=2)
    figure.savefig(folder / "balance.png")

    routing = figures["moe"]["routing"]
    layer = max(range(len(routing["information_bits"])), key=lambda index: routing["information_bits"][index])
    shares = [[share * len(row[layer]) for share in row[layer]] for row in routing["by_theme"]]
    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    image = axes.imshow(shares, aspect="auto", cmap="magma", vmin=0)
    axes.set_yticks(range(len(routing["themes"])), routing["themes"])
    axes.set(xlabel=f"expert of layer {layer + 1}", title="share of a theme's tokens, 1 = even")
    figure.colorbar(image)
    figure.savefig(folder / "themes.png")
