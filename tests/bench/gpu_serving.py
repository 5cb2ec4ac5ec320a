#!/usr/bin/env python3
"""Serve models of published shapes, with random weights made here, and print tokens a second beside what the GPU's memory allows.

    gpu_serving.py --moesaic PROGRAM --work DIR [--shape NAME] [--layers N] [--device cuda] --memory-rate GB/s

Prefill, one stream and 64 streams over HTTP. The bound of one stream is the memory's rate over the bytes that a token reads: all but
the experts that it is not routed to, without its few thousand keys and values. Needs numpy.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from expert_store import Server, Weights, bf16, write_shard

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--max-model-len", "4096", "--log-level", "warn"]
# By name: the golden folder whose configuration and tokenizer it has, and what is other than there.
SHAPES = {
    "deepseek-v2-lite": (
        "deepseek_v2-lite",
        dict(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
            num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
            v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, rope_scaling=None, max_position_embeddings=4096,
        ),
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe-base",
        dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            max_window_layers=48, max_position_embeddings=4096,
        ),
    ),
}  # fmt: skip
RUNS = {
    "prefill of 2048 tokens": ["--prompt-tokens", "2048", "--output-tokens", "1", "--num-requests", "16"],
    "one stream": ["--prompt-tokens", "128", "--output-tokens", "128", "--num-requests", "4"],
    "64 streams": ["--prompt-tokens", "128", "--output-tokens", "128", "--num-requests", "128", "--concurrency", "64"],
}


def tensors(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's matrices and norms."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    prefix, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
    shapes = {prefix + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if config["model_type"] == "deepseek_v2":
        latent, rope, value = config["kv_lora_rank"], config["qk_rope_head_dim"], config["v_head_dim"]
        plain = config["qk_nope_head_dim"]
        shapes[attention + "q_proj.weight"] = (heads * (plain + rope), hidden)
        shapes[attention + "kv_a_proj_with_mqa.weight"] = (latent + rope, hidden)
        shapes[attention + "kv_a_layernorm.weight"] = (latent,)
        shapes[attention + "kv_b_proj.weight"] = (heads * (plain + value), latent)
        shapes[attention + "o_proj.weight"] = (hidden, heads * value)
        num_experts, num_shared = config["n_routed_experts"], config["n_shared_experts"]
    else:
        size, of_keys = config["head_dim"], config["num_key_value_heads"]
        for name, count in (("q", heads), ("k", of_keys), ("v", of_keys)):
            shapes[attention + f"{name}_proj.weight"] = (count * size, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, heads * size)
        shapes |= {attention + f"{name}_norm.weight": (size,) for name in "qk"}
        num_experts, num_shared = config["num_experts"], 0

    def mlp(name: str, width: int):
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, width)

    if layer < config.get("first_k_dense_replace", 0):
        mlp(prefix + "mlp", config["intermediate_size"])
        return shapes
    shapes[prefix + "mlp.gate.weight"] = (num_experts, hidden)
    for expert in range(num_experts):
        mlp(f"{prefix}mlp.experts.{expert}", config["moe_intermediate_size"])
    if num_shared:
        mlp(prefix + "mlp.shared_experts", num_shared * config["moe_intermediate_size"])
    return shapes


def make(folder: Path, name: str, num_layers: int | None) -> dict:
    golden, changes = SHAPES[name]
    source = REPOSITORY / "tests/golden" / golden
    config = json.loads((source / "config.json").read_text()) | changes
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder / file)
    weights = Weights(seed=0)
    of_shape = lambda shape: bf16(weights.matrix(*shape) if len(shape) == 2 else np.ones(shape))
    ends = {name: (config["vocab_size"], config["hidden_size"]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = (config["hidden_size"],)
    shards = [ends] + [tensors(config, layer) for layer in range(config["num_hidden_layers"])]
    for idx, shapes in enumerate(shards):
        write_shard(folder / f"model-{idx:05}.safetensors", {tensor: of_shape(shape) for tensor, shape in shapes.items()})
        print(f"\r{name}: shard {idx + 1} of {len(shards)} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    index = {tensor: f"model-{idx:05}.safetensors" for idx, shapes in enumerate(shards) for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    return config


def measure(program: str, work: Path, name: str, args: argparse.Namespace):
    folder = work / name
    try:
        config = make(folder, name, args.layers)
        with Server(program, folder, ["--device", args.device, *FLAGS]) as server:
            info = server.get("/server_info")["model"]
            print(f"{name}, {config['num_hidden_layers']} layers, {'+'.join(info['weight_formats'])}, on {info['device']}")
            active = 2 * info["num_active_parameters"] - 2 * config["vocab_size"] * config["hidden_size"]
            bound = args.memory_rate * 1e9 / active
            for what, options in RUNS.items():
                report = work / "report.json"
                subprocess.run(
                    [program, "bench", "--url", server.url, "--json", report, *options],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                run = json.loads(report.read_text())["runs"][0]
                if run["num_succeeded"] < run["num_requests"]:
                    raise RuntimeError(f"{what}: {run['errors']}")
                prompts, answers = run["num_prompt_tokens"] / run["duration_s"], run["output_tokens_per_s"]
                share = ""
                if what == "one stream":
                    decode = 1e3 / run["tpot_ms"]["p50"]
                    share = f", decode {decode:.0f}: {decode / bound:.0%} of the bound of {bound:.0f}"
                print(f"  {what:24} {prompts:10.1f} tokens/s in, {answers:10.1f} tokens/s out{share}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moesaic", required=True, help="the program to measure")
    parser.add_argument("--work", type=Path, required=True, help="folder for models; 62 GB for the larger one")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one of them; all where not given")
    parser.add_argument("--layers", type=int, help="layers, where the whole model is too much")
    parser.add_argument("--device", default="cuda", help="where to compute")
    parser.add_argument("--memory-rate", type=float, required=True, help="GB/s that the device reads")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.shape or SHAPES:
        measure(os.path.realpath(args.moesaic), args.work, name, args)


if __name__ == "__main__":
    main()
