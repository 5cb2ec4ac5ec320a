#!/usr/bin/env python3
"""Measure the expert store on a model of OLMoE-1B-7B's shape: hit rates beside Belady's optimum, and decode speed beside
what the disk and the resident model allow.

    expert_store.py make DIR          writes DIR/bf16 (random weights, 14 GB) and packs DIR/int8 (7 GB)
    expert_store.py measure DIR       prints a table; every configuration must give the same tokens
    expert_store.py recall MODEL TEXT how often a layer's router, asked one layer before, names the experts that are chosen
    expert_store.py first MODEL       the first request after a warm-up of all experts, beside the tenth
    expert_store.py beside OLD MODEL  decode speed with all experts resident, of two programs in turns

The routers are skewed: expert number r of a layer's own, seeded order gets the logit log(1 / r^s) added, so that top-k of the
random logits draws experts with Zipf's popularity. The architecture has no router bias, so the first channel of the hidden
state carries it: every embedding has a constant there, no layer writes to it, and the gates read it.

Needs numpy and the binary (--moesaic, default target/release/moesaic).
"""

import argparse
import json
import math
import mmap
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SHAPE = dict(
    architectures=["OlmoeForCausalLM"], model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024,
    num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
    norm_topk_prob=False, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
    max_position_embeddings=4096, hidden_act="silu", torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
)
# What a layer adds to the residual stream, whose entries begin with variance 1: it turns slowly, as in trained models.
BRANCH_SCALE = 0.35
READERS = 2


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Weights:
    """Normal values cut from one pool: a folder is made at the speed of the disk."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.pool = self.random.standard_normal(1 << 24, dtype=np.float32)

    def matrix(self, rows: int, cols: int, scale: float = 1.0) -> np.ndarray:
        start = int(self.random.integers(1 << 22))
        count = rows * cols
        repeats = -(-(start + count) // len(self.pool))
        values = np.tile(self.pool, repeats)[start : start + count] if repeats > 1 else self.pool[start : start + count]
        return values.reshape(rows, cols) * np.float32(scale / math.sqrt(cols))


def write_shard(path: Path, tensors: dict) -> int:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = dict(dtype="BF16", shape=list(values.shape), data_offsets=[offset, offset + values.nbytes])
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.tobytes())
    return offset


def layer_tensors(weights: Weights, layer: int, s: float) -> dict:
    hidden, width, experts = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_experts"]
    prefix = f"model.layers.{layer}."
    tensors = {prefix + f"{name}_layernorm.weight": np.ones(hidden) for name in ("input", "post_attention")}
    for name in "qkvo":
        tensors[prefix + f"self_attn.{name}_proj.weight"] = weights.matrix(hidden, hidden)
    for name in "qk":
        tensors[prefix + f"self_attn.{name}_norm.weight"] = np.ones(hidden)
    gate = weights.matrix(experts, hidden)
    ranks = weights.random.permutation(experts) + 1
    # Normalised, the constant is 1 over the root mean square, which grows with what the layers add.
    gate[:, 0] = -s * np.log(ranks) * math.sqrt(1 + 2 * layer * BRANCH_SCALE**2)
    tensors[prefix + "mlp.gate.weight"] = gate
    for expert in range(experts):
        name = prefix + f"mlp.experts.{expert}."
        tensors[name + "gate_proj.weight"] = weights.matrix(width, hidden)
        tensors[name + "up_proj.weight"] = weights.matrix(width, hidden)
        # The weights of eight experts sum to less than 1 and SiLU halves: back to about the branch's scale.
        tensors[name + "down_proj.weight"] = weights.matrix(hidden, width, 6 * BRANCH_SCALE)
        tensors[name + "down_proj.weight"][0] = 0
    output = tensors[prefix + "self_attn.o_proj.weight"] = tensors[prefix + "self_attn.o_proj.weight"] * BRANCH_SCALE
    output[0] = 0
    return {name: bf16(values) for name, values in tensors.items()}


def make(args: argparse.Namespace) -> None:
    folder = args.dir / "bf16"
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPE | dict(num_hidden_layers=args.layers)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((args.tokenizer / name).read_bytes())
    weights, hidden, vocab = Weights(args.seed), SHAPE["hidden_size"], SHAPE["vocab_size"]
    embedding = weights.matrix(vocab, hidden, math.sqrt(hidden))
    embedding[:, 0] = 1
    head = weights.matrix(vocab, hidden)
    head[:, 0] = 0
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(hidden), "lm_head.weight": head}
    index, total = {}, 0
    for shard in range(args.layers + 1):
        tensors = layer_tensors(weights, shard - 1, args.s) if shard else {k: bf16(v) for k, v in ends.items()}
        file = f"model-{shard:05}.safetensors"
        total += write_shard(folder / file, tensors)
        index |= dict.fromkeys(tensors, file)
        print(f"\r{shard} of {args.layers} layers, {total / 1e9:.1f} GB", end="", file=sys.stderr)
    print(file=sys.stderr)
    index = dict(metadata=dict(total_size=total), weight_map=index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    command = [args.moesaic, "quantize", folder, "--to", "int8", "--out", args.dir / "int8"]
    subprocess.run(list(map(str, command)), check=True)


class Server:
    def __init__(self, moesaic: Path, model: Path, flags: list):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [moesaic, "serve", model, "--port", port, "--output-cache", "off", "--enable-prefix-caching=false", *flags]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        os.set_blocking(self.process.stderr.fileno(), False)
        while True:
            try:
                urllib.request.urlopen(self.url + "/ready", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    sys.exit(self.process.stderr.read().decode())
                time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=60)

    def get(self, path: str) -> dict:
        return json.load(urllib.request.urlopen(self.url + path, timeout=60))

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=600))

    def text(self, path: str) -> str:
        return urllib.request.urlopen(self.url + path, timeout=60).read().decode()

    def metrics(self) -> dict:
        sums = {}
        for name, value in re.findall(r"^(\w[\w:]*)(?:\{.*\})? (\S+)$", self.text("/metrics"), re.M):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def complete(self, seed: int, num_tokens: int) -> dict:
        """One stream: its text, its experts, the seconds of each token after the first."""
        prompt = np.random.default_rng(seed).integers(100, 40_000, 8).tolist()
        body = dict(prompt=prompt, max_tokens=num_tokens, ignore_eos=True, temperature=1.0, seed=seed, stream=True,
                    return_routed_experts=True, return_token_ids=True)
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        tokens, experts, times = [], [], []
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                choice = json.loads(line[6:])["choices"][0]
                times += [time.perf_counter()] * len(choice.get("token_ids") or [])
                tokens += choice.get("token_ids") or []
                experts += choice.get("routed_experts") or []
        if len(tokens) != num_tokens:
            sys.exit(f"{len(tokens)} tokens of {num_tokens}")
        per_token = (times[-1] - times[0]) / (num_tokens - 1)
        return dict(tokens=tokens, experts=experts, began=times[0], last=times[-1], times=times, per_token=per_token)


def belady(trace: list, capacity: int, skip: int) -> float:
    """Share of hits, behind the first `skip` uses, where the expert goes that is used farthest in the future. `trace`:
    (layer, expert) in order."""
    next_use, later = [0] * len(trace), {}
    for at in range(len(trace) - 1, -1, -1):
        next_use[at] = later.get(trace[at], math.inf)
        later[trace[at]] = at
    resident, hits = {}, 0
    for at, (expert, next_at) in enumerate(zip(trace, next_use)):
        hits += expert in resident and at >= skip
        if expert not in resident and len(resident) >= capacity:
            del resident[max(resident, key=resident.get)]
        resident[expert] = next_at
    return hits / (len(trace) - skip)


def zipf_exponent(trace: list) -> float:
    """Slope of log load over log rank, over the upper half of the ranks of all layers."""
    slopes = []
    for layer in {layer for layer, _ in trace}:
        loads = np.bincount([expert for at, expert in trace if at == layer], minlength=SHAPE["num_experts"])
        loads = np.sort(loads)[::-1][: SHAPE["num_experts"] // 2]
        slopes.append(np.polyfit(np.log(np.arange(1, len(loads) + 1)), np.log(np.maximum(loads, 1)), 1)[0])
    return -statistics.mean(slopes)


def disk_rate(model: Path, piece: int, mode: str, seconds: float = 4.0) -> float:
    """Bytes per second of reads of a matrix's size by as many threads as the server has, from the model's own files, past the
    page cache or from it."""
    files = sorted(model.glob("*.safetensors"))
    handles = [os.open(file, os.O_RDONLY | (os.O_DIRECT if mode == "direct" else 0)) for file in files]
    sizes = [file.stat().st_size for file in files]
    piece = piece // 4096 * 4096
    end = time.perf_counter() + seconds

    def read(thread: int) -> int:
        random, buffer, done = np.random.default_rng(thread), mmap.mmap(-1, piece), 0
        while time.perf_counter() < end:
            file = int(random.integers(len(handles)))
            done += os.preadv(handles[file], [buffer], int(random.integers(max(1, (sizes[file] - piece) // 4096))) * 4096)
        return done

    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    for handle in handles:
        os.close(handle)
    return total / seconds


def run_streams(server: Server, seed: int, args: argparse.Namespace) -> dict:
    """As many streams as wanted at once, with the seconds that each token of all took behind the first ones."""
    with ThreadPoolExecutor(args.streams) as pool:
        runs = list(pool.map(lambda stream: server.complete(seed * 1000 + stream, args.tokens), range(args.streams)))
    seconds = max(run["last"] for run in runs) - max(run["began"] for run in runs)
    num_tokens = sum(sum(time > max(other["began"] for other in runs) for time in run["times"]) for run in runs)
    return dict(tokens=[run["tokens"] for run in runs], experts=runs[0]["experts"], per_token=seconds / num_tokens)


def measure(args: argparse.Namespace) -> None:
    model, tokens = args.dir / "int8", args.tokens
    budget = ["--expert-memory", args.budget, "--expert-read", args.read]
    if args.read == "cached":
        for file in model.glob("*.safetensors"):
            with file.open("rb") as reading:
                while reading.read(1 << 24):
                    pass
    configurations = {
        "all resident": [],
        "lfru, prefetch": [*budget],
        "lfru": [*budget, "--expert-prefetch=false"],
        "lru, prefetch": [*budget, "--expert-policy", "lru"],
        "lru": [*budget, "--expert-policy", "lru", "--expert-prefetch=false"],
    }
    expected, resident_speed, expert_bytes, uses = None, None, 0, []
    print(f"{'configuration':<16} {'tok/s':>7} {'hits':>6} {'read MB/tok':>11} {'disk MB/s':>9} {'bound tok/s':>11} {'of bound':>8}"
          f" {'recall':>7} {'waited':>7}")
    for name, flags in configurations.items():
        if flags and not name.startswith(args.only or ""):
            continue
        with Server(args.moesaic, model, ["--threads", args.threads, *flags]) as server:
            warmed = server.complete(1, args.warm)
            before = server.metrics()
            runs = [run_streams(server, seed, args) for seed in range(2, 2 + args.runs)]
            after, info = server.metrics(), server.get("/server_info")["model"]
        found = [run["tokens"] for run in runs]
        expected = expected or found
        if found != expected:
            sys.exit(f"{name}: other tokens than with all experts resident")
        speed = 1 / statistics.median(run["per_token"] for run in runs)
        if not flags:
            resident_speed = speed
            expert_bytes = info["expert_bytes"] // (args.layers * SHAPE["num_experts"])
            uses = [[(layer, expert) for token in run["experts"] for layer, row in enumerate(token) for expert in row]
                    for run in (warmed, *runs)]
            print(f"{name:<16} {speed:7.2f}")
            continue
        gone = {key: after.get(key, 0.0) - before.get(key, 0.0) for key in after}
        count = lambda what: gone.get(f"moesaic_expert_{what}_total", 0.0)
        hits, misses = count("cache_hits"), count("cache_misses")
        read, missed = count("read_bytes"), (misses + count("prefetch_used")) * expert_bytes
        num_tokens = args.runs * tokens * args.streams
        rate = disk_rate(model, expert_bytes // 2, args.read)
        bound = min(resident_speed, rate / max(1.0, missed / num_tokens))
        recall = after.get("moesaic_routing_accuracy", math.nan)
        print(f"{name:<16} {speed:7.2f} {hits / (hits + misses):6.3f} {read / num_tokens / 1e6:11.1f} {rate / 1e6:9.0f}"
              f" {bound:11.2f} {speed / bound:8.2f} {recall:7.3f} {after['moesaic_expert_wait_share']:7.2f}")
        if args.details:
            ends = " ".join(f"{end} {count(f'prefetch_{end}'):.0f}" for end in ("issued", "used", "late", "wasted"))
            load = gone["moesaic_expert_load_seconds_sum"] / max(1, gone["moesaic_expert_load_seconds_count"])
            print(f"    {load * 1e3:.1f} ms a read; read ahead: {ends}; misses {misses:.0f}")
    if args.streams > 1:
        return
    capacity = int(args.layers * SHAPE["num_experts"] * float(args.budget.rstrip("%")) / 100)
    trace = [use for run in uses for use in run]
    print(f"Belady's hits of the same uses: {belady(trace, capacity, len(uses[0])):.3f} with {capacity} experts;"
          f" the loads' Zipf exponent is {zipf_exponent(trace):.2f}")


def recall(args: argparse.Namespace) -> None:
    prompts = [text.strip() for text in args.text.read_text().split("\n\n") if len(text.strip()) > 200][: args.prompts]
    with Server(args.moesaic, args.model, ["--threads", args.threads, "--expert-memory", args.budget]) as server:
        for seed, prompt in enumerate(prompts):
            server.post("/v1/completions", dict(prompt=prompt, max_tokens=args.tokens, ignore_eos=True, temperature=0.8, seed=seed))
        # Told once a second.
        time.sleep(1.1)
        server.post("/v1/completions", dict(prompt=prompts[0], max_tokens=1))
        text = server.text("/metrics")
    print(f"{args.model.name}: {len(prompts)} prompts, {args.tokens} tokens after each")
    shares = re.findall(r'^moesaic_routing_layer_accuracy\{[^}]*layer="(\d+)"[^}]*\} (\S+)$', text, re.M)
    for layer, share in sorted(shares, key=lambda pair: int(pair[0])):
        print(f"layer {layer:>3}  {float(share):.3f}")
    whole = re.search(r"^moesaic_routing_accuracy\{[^}]*next_layer[^}]*\} (\S+)$", text, re.M)[1]
    print(f"all        {float(whole):.3f}")


def first(args: argparse.Namespace) -> None:
    flags, ratios = ["--threads", args.threads, "--expert-memory", args.budget, "--expert-warmup", "all"], []
    flags += ["--expert-profile", args.profile] if args.profile else []
    for run in range(args.runs):
        for path in args.model.glob("*.safetensors") if args.cold else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with Server(args.moesaic, args.model, flags) as server:
            seconds = []
            for seed in range(10):
                start = time.perf_counter()
                server.complete(100 * run + seed, args.tokens)
                seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[9])
        print(f"first {seconds[0]:.3f} s, tenth {seconds[9]:.3f} s, ratio {ratios[-1]:.3f}")
    print(f"median {statistics.median(ratios):.3f} with {args.budget} of the experts in memory")


def beside(args: argparse.Namespace) -> None:
    """Both run at once and answer in turns, so that whatever else the machine does meets both alike."""
    flags = ["--threads", args.threads]
    with Server(args.old, args.model, flags) as old, Server(args.moesaic, args.model, flags) as new:
        ratios = []
        for run in range(args.runs + 1):
            # Whoever is first in one round is second in the next.
            pair = [(old, new), (new, old)][run % 2]
            seconds = {server: run_streams(server, run, args)["per_token"] for server in pair}
            # The first round warms both.
            if run:
                ratios.append(seconds[old] / seconds[new])
                print(f"old {1 / seconds[old]:.2f} tok/s, new {1 / seconds[new]:.2f}, ratio {ratios[-1]:.3f}", flush=True)
    quarters = statistics.quantiles(ratios, n=4)
    print(f"median {statistics.median(ratios):.3f}, half of them between {quarters[0]:.3f} and {quarters[2]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moesaic", type=Path, default=Path("target/release/moesaic"))
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make")
    making.add_argument("dir", type=Path)
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--s", type=float, default=1.0, help="Zipf's exponent")
    making.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and tokenizer_config.json")
    making.set_defaults(run=make)
    measuring = commands.add_parser("measure")
    measuring.add_argument("dir", type=Path)
    measuring.add_argument("--budget", default="50%")
    measuring.add_argument("--tokens", type=int, default=200)
    measuring.add_argument("--warm", type=int, default=200, help="tokens before anything is counted")
    measuring.add_argument("--runs", type=int, default=3)
    measuring.add_argument("--streams", type=int, default=1, help="requests at once")
    measuring.add_argument("--read", default="direct", choices=("direct", "cached"), help="from the disk, or from the page cache")
    measuring.add_argument("--only", help="the configurations whose names begin so, beside the resident one")
    measuring.add_argument("--details", action="store_true", help="what became of what was read")
    measuring.set_defaults(run=measure)
    recalling = commands.add_parser("recall")
    recalling.add_argument("model", type=Path)
    recalling.add_argument("text", type=Path, help="prompts, with empty lines between them")
    recalling.add_argument("--prompts", type=int, default=20)
    recalling.add_argument("--tokens", type=int, default=40)
    recalling.add_argument("--budget", default="50%")
    recalling.set_defaults(run=recall)
    comparing = commands.add_parser("first")
    comparing.add_argument("model", type=Path)
    comparing.add_argument("--budget", default="90%")
    comparing.add_argument("--profile", type=Path, help="which experts are hot, from `moesaic profile`")
    comparing.add_argument("--cold", action="store_true", help="with nothing of the model in the page cache")
    comparing.add_argument("--tokens", type=int, default=40)
    comparing.add_argument("--runs", type=int, default=3)
    comparing.set_defaults(run=first)
    pairing = commands.add_parser("beside")
    pairing.add_argument("old", type=Path)
    pairing.add_argument("model", type=Path)
    pairing.add_argument("--tokens", type=int, default=100)
    pairing.add_argument("--runs", type=int, default=15, help="rounds, two at least")
    pairing.add_argument("--streams", type=int, default=1, help="requests at once")
    pairing.set_defaults(run=beside)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
