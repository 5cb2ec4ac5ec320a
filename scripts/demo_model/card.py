"""The model card, from what was measured."""

import json
from pathlib import Path

BARS = {"perplexity": 1.0, "judged": 2.5, "distinct": 0.7, "ended": 0.9, "load": 1.6, "drafts": 0.5}


def verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def card(work: Path) -> str:
    f = json.loads((work / "figures.json").read_text())
    moe, dense, routing, judged = f["moe"], f["dense"], f["routing"], f["judged"]
    ratio = moe["held_out_perplexity"] / dense["held_out_perplexity"]
    judged_ratio = judged["ours"] / judged["writer"]
    distinct = f["distinct_3"]["ours"] / f["distinct_3"]["training_text"]
    load = max(routing["max_over_mean"])
    informed = all(bits > p99 for bits, p99 in zip(routing["information_bits"], routing["shuffled_p99_bits"]))
    statistics = f["statistics"]
    layers = "\n".join(
        f"| {index + 1}{' (MTP)' if index == len(routing['loads']) - 1 else ''} | {routing['max_over_mean'][index]:.2f} | "
        f"{routing['min_over_mean'][index]:.2f} | {bits:.4f} | {routing['shuffled_mean_bits'][index]:.4f} | {routing['shuffled_p99_bits'][index]:.4f} |"
        for index, bits in enumerate(routing["information_bits"])
    )
    quant = "\n".join(
        f"| {name} | {row['reference']['mean_kl']:.4f} | {row['reference']['greedy_agreement_percent']:.1f} % | {row['perplexity']:.3f} |"
        for name, row in f["quantization"].items()
    )
    samples = "\n\n".join(
        f"> **{one['ask']}**\n>\n"
        + "\n".join(f"> {line}" for line in one["answer"].split("\n"))
        + ("" if one["finish"] == "stop" else "\n>\n> *(cut off)*")
        for one in f["samples"]
    )
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# moesaic-tiny

A mixture of experts of {moe["parameters"] / 1e6:.1f} million parameters, {moe["active_parameters"] / 1e6:.1f} million of them active for a token, that tells short
stories to children. It is a demonstration: it shows a server at work, with routing that was learned, on a machine without a
network. It is DeepSeek-V3's architecture (latent attention, one shared and 32 routed experts of which four are chosen by sigmoid
scores with a balancing bias, a dense first layer, one layer of multi-token prediction), a byte-level BPE of 4,096 tokens, a context of
1,024 tokens, packed in int4 by `moesaic quantize`.

## What it cannot do
It knows nothing but what a model of 135 million parameters wrote about foxes, kitchens and the moon. It does not answer
questions about the world reliably, count, follow instructions beyond those below, read anything but simple English, or remember
what was said long ago. Names change within a story, and what happens is often odd. Use it for nothing that matters.

## Measured
Each figure is from `scripts/demo_model`, on text that was held out by prompt; the packed model through Moesaic's API where it is served.

| | measured | wanted | met |
|---|---|---|---|
| held-out perplexity over that of a dense model with {dense["active_parameters"] / 1e6:.1f} M parameters, same data and steps | {moe["held_out_perplexity"]:.2f} / {dense["held_out_perplexity"]:.2f} = {ratio:.3f} | ≤ 1 | {verdict(ratio <= BARS["perplexity"])} |
| perplexity of {judged["num_ours"]} stories (temperature 0.7) to SmolLM2-135M-Instruct, over that of its own {judged["num_writer"]} | {judged["ours"]:.2f} / {judged["writer"]:.2f} = {judged_ratio:.2f} | ≤ 2.5 | {verdict(judged_ratio <= BARS["judged"])} |
| distinct-3 of stories over that of training text ({f["distinct_3"]["num_words"]:,} words each) | {f["distinct_3"]["ours"]:.3f} / {f["distinct_3"]["training_text"]:.3f} = {distinct:.2f} | ≥ 0.7 | {verdict(distinct >= BARS["distinct"])} |
| chat turns that end by themselves, of {f["ended"]["num_prompts"]} | {100 * f["ended"]["prompts"]:.1f} % | ≥ 90 % | {verdict(f["ended"]["prompts"] >= BARS["ended"])} |
| largest load of an expert over the mean, worst layer | {load:.2f} | ≤ 1.6 | {verdict(load <= BARS["load"])} |
| theme and expert share more than shuffled themes do (99th percentile), every layer | see below | yes | {verdict(informed)} |
| first draft token accepted, greedy | {100 * f["drafts_accepted"]:.1f} % | ≥ 50 % | {verdict(f["drafts_accepted"] >= BARS["drafts"])} |
| largest difference of a log-probability from transformers', float folder | {f["reference"]["largest_difference"]:.1e} | ≤ 1e-3 | {verdict(f["reference"]["largest_difference"] <= 1e-3)} |
| same 32 greedy tokens as transformers | {f["reference"]["same_greedy"]} of {f["reference"]["num_prompts"]} | | |

| MoE layer | largest load | least load | theme and expert, bits | shuffled, mean | 99th percentile |
|---|---|---|---|---|---|
{layers}

| format | KL divergence, nats | same best token | perplexity |
|---|---|---|---|
{quant}

![Loss](loss.png)
![Balance](balance.png)
![Themes](themes.png)

## Data
Written by SmolLM2-135M-Instruct (Apache-2.0), served by Moesaic with 32 streams, from prompts that `prompts.py` composes of word lists and a
seed: {statistics["documents"]:,} documents, {statistics["tokens"]:,} tokens, {statistics["held_out_tokens"]:,} of them held out. The text is not kept; fifty of its documents are in
`data_samples.jsonl`, its statistics in `data_statistics.json`. Left out: {", ".join(f"{count:,} {why}" for why, count in statistics["left_out"].items())}.

Trained for {moe["steps"]:,} steps, {moe["tokens"] / 1e6:.1f} M tokens, {moe["seconds"] / 60:.0f} minutes; every figure over time is in `training.csv`.

Licence: Apache-2.0.

## Twenty answers, as they came
{samples}
"""


def write_card(work: Path, folder: Path):
    (folder / "README.md").write_text(card(work), encoding="utf-8")
