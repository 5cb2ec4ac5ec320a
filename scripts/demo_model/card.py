"""The model card, from what was measured."""

import json
from pathlib import Path
from statistics import median

BARS = {"perplexity": 1.0, "judged": 2.5, "distinct": 0.7, "ended": 0.9, "load": 1.6, "drafts": 0.5, "difference": 1e-3}
SERVING_BARS = {"ready_seconds": 0.2, "resident_bytes": 150e6, "tokens_per_second": 300}
# KL divergence in nats, greedy agreement in percent.
QUANT_BARS = {"int8": (0.003, 97), "int4": (0.06, 85)}


def verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def counts(left_out: dict) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "none"


def quant_row(name: str, row: dict) -> str:
    kl, agreement = row["reference"]["mean_kl"], row["reference"]["greedy_agreement_percent"]
    most, least = QUANT_BARS[name.split()[-1]]
    return f"| {name} | {kl:.4f} | {agreement:.1f} % | {row['perplexity']:.3f} | {verdict(kl <= most and agreement >= least)} |"


def card(work: Path) -> str:
    f = json.loads((work / "figures.json").read_text())
    moe, dense, routing, served, server = f["moe"], f["dense"], f["moe"]["routing"], f["served"], f["server"]
    judged, reference = served["judged"], f["reference"]
    ratio = moe["held_out_perplexity"] / dense["held_out_perplexity"]
    judged_ratio = judged["ours"] / judged["writer"]
    distinct = served["distinct_3"]["ours"] / served["distinct_3"]["training_text"]
    load = max(routing["max_over_mean"])
    informed = all(bits > p99 for bits, p99 in zip(routing["information_bits"], routing["shuffled_p99_bits"]))
    statistics = f["statistics"]
    difference = max(reference["training"], reference["server"])
    (run,) = server["bench"]["runs"]
    machine = server["bench"]["machine"]
    ready = median(server["ready_seconds"])
    served_parameters = moe["parameters"] - moe["mtp_parameters"]
    layers = "\n".join(
        f"| {index + 1}{' (MTP)' if index == len(routing['loads']) - 1 else ''} | {routing['max_over_mean'][index]:.2f} | "
        f"{routing['min_over_mean'][index]:.2f} | {bits:.4f} | {routing['shuffled_mean_bits'][index]:.4f} | {routing['shuffled_p99_bits'][index]:.4f} |"
        for index, bits in enumerate(routing["information_bits"])
    )
    perplexity = f["quantization"]["int4"]["reference"]["perplexity"]
    quant = "\n".join(quant_row(name, row) for name, row in f["quantization"].items())
    samples = "\n\n".join(
        f"> **{one['ask']}**\n>\n"
        + "\n".join(f"> {line}" for line in one["answer"].split("\n"))
        + ("" if one["finish"] == "stop" else "\n>\n> *(cut off)*")
        for one in served["samples"]
    )
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# moesaic-tiny

A mixture of experts of {served_parameters / 1e6:.1f} million parameters, {moe["active_parameters"] / 1e6:.1f} million of them active for a token, that tells short
stories in simple English; with the layer that looks one token further {moe["parameters"] / 1e6:.1f} million. It is a demonstration: it shows a server at work, with routing that was learned, on a machine without a
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
| distinct-3 of stories over that of training text ({served["distinct_3"]["num_words"]:,} words each) | {served["distinct_3"]["ours"]:.3f} / {served["distinct_3"]["training_text"]:.3f} = {distinct:.2f} | ≥ 0.7 | {verdict(distinct >= BARS["distinct"])} |
| chat turns that end by themselves, of {served["ended"]["num_prompts"]} | {100 * served["ended"]["prompts"]:.1f} % | ≥ 90 % | {verdict(served["ended"]["prompts"] >= BARS["ended"])} |
| largest load of an expert over the mean, worst layer | {load:.2f} | ≤ 1.6 | {verdict(load <= BARS["load"])} |
| theme and expert share more than shuffled themes do (99th percentile), every layer | see below | yes | {verdict(informed)} |
| first draft token accepted, greedy | {100 * moe["drafts_accepted"]:.1f} % | ≥ 50 % | {verdict(moe["drafts_accepted"] >= BARS["drafts"])} |
| largest difference of a log-probability from transformers': of training's definition, of the server, both in float | {reference["training"]:.1e}, {reference["server"]:.1e} | ≤ 1e-3 | {verdict(difference <= BARS["difference"])} |
| same 32 greedy tokens as transformers, float | {reference["same_greedy"]} of {reference["num_prompts"]} | | |
| from the start of the server to ready, median of {len(server["ready_seconds"])} | {1000 * ready:.0f} ms | < 200 ms | {verdict(ready < SERVING_BARS["ready_seconds"])} |
| resident memory, ready and after {server["num_chats"]} chats, KV cache of 32 MiB | {server["resident_bytes_ready"] / 1e6:.0f} MB, {server["resident_bytes"] / 1e6:.0f} MB | < 150 MB | {verdict(server["resident_bytes"] < SERVING_BARS["resident_bytes"])} |
| tokens a second, one stream, 32 in, {server["bench"]["output_tokens"]} out | {run["output_tokens_per_s"]:.0f} | ≥ 300 | {verdict(run["output_tokens_per_s"] >= SERVING_BARS["tokens_per_second"])} |

The last three on {machine["cores"]} cores of {machine["cpu"]}. SmolLM2 judges texts by themselves, without what was asked, in int8; its own answer the same
questions, were drawn at the same temperature with `top_p` 0.95 and a frequency penalty of 0.5, as all of the training text, and are those that the filter kept.
Drafts are counted on the tokens of held-out answers.

| MoE layer | largest load | least load | theme and expert, bits | shuffled, mean | 99th percentile |
|---|---|---|---|---|---|
{layers}

| format, against float (perplexity {perplexity:.3f}) | KL divergence, nats | same best token | perplexity | as wanted |
|---|---|---|---|---|
{quant}

On held-out answers one after the other, without the frame of a chat. Wanted are 0.003 nats and 97 % of int8, 0.06 and 85 % of int4.

![Loss](loss.png)
![Balance](balance.png)
![Themes](themes.png)

## Data
Written by SmolLM2-135M-Instruct (Apache-2.0), served by Moesaic with 32 streams, from prompts that `prompts.py` composes of word lists and a
seed: {statistics["documents"]:,} documents, {statistics["tokens"]:,} tokens, {statistics["held_out_tokens"]:,} of them held out. The text is not kept; fifty of its documents are in
`data_samples.jsonl`, its statistics in `data_statistics.json`. Left out whole: {counts(statistics["left_out"]["whole"])}; from a later turn on:
{counts(statistics["left_out"]["later_turns"])}.

Trained for {moe["steps"]:,} steps, {moe["tokens"] / 1e6:.1f} M tokens, in {moe["seconds"] / 60:.0f} minutes on {moe["machine"]}; the dense model, of {dense["active_parameters"]:,}
parameters beside {moe["active_parameters"]:,} active ones, in {dense["seconds"] / 60:.0f}. Losses and balance over time are in `training.csv`, texts in `samples.csv`, all figures
in `figures.json`.

Licence: Apache-2.0.

## Twenty answers, as they came
{samples}
"""


def write_card(work: Path, folder: Path):
    (folder / "README.md").write_text(card(work), encoding="utf-8")
