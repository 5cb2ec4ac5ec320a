#!/usr/bin/env python3
"""Checkpoints of configurations that no golden folder has: sizes, options, spelling and layout drawn at random.

    unseen.py --out DIR [--arch A] [--seed N] [--count N]
    cargo run -p moesaic-engine --example golden -- DIR      # the engine against them

Each folder DIR/<arch>-<seed>.<n>/ is one of make_tiny.py's, and says in its reference.json what was drawn. References come
from transformers, as there. The greedy continuations are short and their margins small: a difference in a token is a
difference in the logits first.

longrope and dynamic NTK are fixed at load from the served length, so the reference model's frequencies are fixed at
`max_model_len` too, which reference.json then holds.
"""

import argparse
import copy
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import make_tiny as tiny
from make_tiny import Config, Dims, Variant

tiny.NEW_TOKENS = 12
tiny.MIN_MARGIN = 0.003
ATTEMPTS = 6
ACTIVATIONS = ["silu"] * 5 + ["gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "swish"]


def draw_dims(r: random.Random) -> Dims:
    heads = r.choice([1, 2, 3, 4, 5, 6])
    head_dim = r.choice([8, 16, 20, 24, 40])
    kv_heads = r.choice([n for n in range(1, heads + 1) if heads % n == 0])
    hidden = heads * head_dim if r.random() < 0.4 else heads * r.choice([12, 16, 20, 28])
    experts = r.choice([4, 5, 7, 8, 12])
    return Dims(
        "drawn", hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, inter=r.choice([36, 50, 72, 96]),
        moe_inter=r.choice([18, 24, 33, 40]), experts=experts, top_k=r.choice([k for k in (1, 2, 3, 5) if k < experts]),
        layers=r.choice([1, 2, 2, 3, 7]), tok_vocab=r.choice([290, 303, 331, 384]), vocab_pad=r.choice([0, 1, 13, 32]),
        q_lora=r.choice([10, 24, 33]), kv_lora=r.choice([12, 16, 30]), nope=r.choice([6, 12, 16, 20]),
        rope=r.choice([4, 8, 12, 16]), v_dim=r.choice([6, 10, 16, 24]), flip=False)


def draw_rope(r: random.Random, half: int, kinds: list[str]) -> tuple[Config, int | None]:
    """Keys to merge into a hub-style config, and the served length where it matters."""
    kind = r.choice(kinds)
    name = r.choice(["type", "rope_type"])
    if kind == "none":
        return {"rope_scaling": None}, None
    if kind == "linear":
        return {"rope_scaling": {name: "linear", "factor": r.choice([2.0, 3, 8.5])}}, None
    if kind == "dynamic":
        length = r.choice([256, 300, 700])
        return {"rope_scaling": {name: "dynamic", "factor": r.choice([4.0, 6])}, "max_position_embeddings": 256}, length
    if kind == "llama3":
        return {"rope_scaling": {name: "llama3", "factor": r.choice([4.0, 8]), "low_freq_factor": r.choice([1.0, 1.5]),
                                 "high_freq_factor": r.choice([3.0, 4]),
                                 "original_max_position_embeddings": r.choice([32, 64, 90])}}, None
    if kind == "longrope":
        scaling = {name: "longrope", "short_factor": [1.0 + 0.1 * i for i in range(half)],
                   "long_factor": [1.5 + i for i in range(half)]}
        over: Config = {"rope_scaling": scaling, "max_position_embeddings": 2048}
        place = r.choice([scaling, over])
        place["original_max_position_embeddings"] = 512
        if r.random() < 0.3:
            scaling["attention_factor"] = 1.2
        if r.random() < 0.3:
            scaling["factor"] = 6.0
        return over, r.choice([300, 512, 513, 2048])
    scaling = {name: "yarn", "factor": r.choice([4.0, 16, 40, 0.5]), "original_max_position_embeddings": r.choice([32, 64])}
    optional = {"beta_fast": r.choice([1, 8.0, 24]), "beta_slow": r.choice([1.0, 2]), "truncate": False,
                "attention_factor": 1.3, "mscale": r.choice([0.7, 1.0]), "mscale_all_dim": r.choice([0.5, 1.0, 0])}
    scaling |= {key: value for key, value in optional.items() if r.random() < 0.4}
    over = {"rope_scaling": scaling, "max_position_embeddings": r.choice([512, 1024])}
    if r.random() < 0.2 and not scaling.get("mscale_all_dim"):
        scaling["factor"] = None
    if r.random() < 0.2:
        over["original_max_position_embeddings"] = 48
    return over, None


ROPES = ["none", "none", "linear", "dynamic", "yarn", "yarn", "llama3", "longrope"]


def flag(r: random.Random) -> bool:
    return r.random() < 0.5


def rope_of(r: random.Random, half: int, cfg: Config, kinds=ROPES) -> int | None:
    over, length = draw_rope(r, half, kinds)
    cfg.update(over, rope_theta=r.choice([1e4, 5e5, 1e6]))
    return length


def base(d: Dims, r: random.Random, name: str, model_type: str, **over) -> Config:
    cfg = tiny.common(
        d, architectures=[name], model_type=model_type, hidden_act=r.choice(ACTIVATIONS), tie_word_embeddings=flag(r),
        rms_norm_eps=r.choice([1e-6, 1e-5, 1e-3]))
    if flag(r) or d.hidden // d.heads % 2:
        cfg["head_dim"] = d.head_dim
    return cfg | over


def head_half(d: Dims, cfg: Config) -> int:
    return (cfg.get("head_dim") or d.hidden // d.heads) // 2


def mixtral(d, r):
    cfg = base(d, r, "MixtralForCausalLM", "mixtral", num_local_experts=d.experts, num_experts_per_tok=d.top_k,
               intermediate_size=d.moe_inter, sliding_window=r.choice([None, None, 9, 64]))
    length = rope_of(r, head_half(d, cfg), cfg)
    if cfg["rope_scaling"]:  # some stretched kinds fail in transformers where the key is null
        cfg.setdefault("head_dim", d.hidden // d.heads)
    return cfg, length


def qwen_sparse(d, r) -> Config:
    return dict(
        num_experts=d.experts, num_experts_per_tok=d.top_k, moe_intermediate_size=d.moe_inter, norm_topk_prob=flag(r),
        decoder_sparse_step=r.choice([1, 1, 2, 3]), mlp_only_layers=r.choice([[], None, [0], [1]]),
        use_sliding_window=flag(r), sliding_window=r.choice([5, 20]), max_window_layers=r.choice([0, 1, 3, 28]))


def qwen2_moe(d, r):
    cfg = base(d, r, "Qwen2MoeForCausalLM", "qwen2_moe", shared_expert_intermediate_size=r.choice([20, 48]),
               qkv_bias=flag(r), **qwen_sparse(d, r))
    if flag(r):
        kinds = ["full_attention", "sliding_attention"] if cfg["use_sliding_window"] else ["full_attention"]
        cfg["layer_types"] = [r.choice(kinds) for _ in range(d.layers)]
    return cfg, rope_of(r, head_half(d, cfg), cfg)


def qwen3_moe(d, r):
    cfg = base(d, r, "Qwen3MoeForCausalLM", "qwen3_moe", attention_bias=flag(r), **qwen_sparse(d, r))
    return cfg, rope_of(r, head_half(d, cfg), cfg)


def olmoe(d, r):
    cfg = base(d, r, "OlmoeForCausalLM", "olmoe", num_experts=d.experts, num_experts_per_tok=d.top_k,
               intermediate_size=d.moe_inter, norm_topk_prob=flag(r), clip_qkv=r.choice([None, 0.8, 3.0]),
               attention_bias=flag(r))
    cfg.pop("head_dim", None)
    if d.hidden // d.heads % 2:
        cfg["hidden_size"] = d.heads * 16
    return cfg, rope_of(r, cfg["hidden_size"] // d.heads // 2, cfg)


def granitemoe(d, r, **over):
    cfg = base(d, r, "GraniteMoeForCausalLM", "granitemoe", num_local_experts=d.experts, num_experts_per_tok=d.top_k,
               intermediate_size=d.moe_inter, attention_bias=flag(r), embedding_multiplier=r.choice([1, 1.0, 12, 2.5]),
               logits_scaling=r.choice([1.0, 6]), residual_multiplier=r.choice([1.0, 0.22, 0.6]),
               attention_multiplier=r.choice([0.1, 0.25, 1]))
    cfg.pop("head_dim", None)
    if d.hidden // d.heads % 2:
        cfg["hidden_size"] = d.heads * 16
    cfg.update(over)
    return cfg, rope_of(r, cfg["hidden_size"] // d.heads // 2, cfg)


def granitemoeshared(d, r):
    return granitemoe(d, r, architectures=["GraniteMoeSharedForCausalLM"], model_type="granitemoeshared",
                      shared_intermediate_size=r.choice([0, 22, 40]))


def mla(d, r, name, model_type, **over) -> Config:
    cfg = base(d, r, name, model_type, num_key_value_heads=d.heads, q_lora_rank=r.choice([None, d.q_lora]),
               kv_lora_rank=d.kv_lora, qk_nope_head_dim=d.nope, qk_rope_head_dim=d.rope, v_head_dim=d.v_dim,
               moe_intermediate_size=d.moe_inter, n_shared_experts=r.choice([1, 2, 3]), attention_bias=flag(r),
               first_k_dense_replace=r.choice([0, 0, 1, d.layers]), moe_layer_freq=1,
               routed_scaling_factor=r.choice([1.0, 2.5, 3.0]))
    cfg.pop("head_dim", None)
    groups = r.choice([1, 1, 2, 4])
    group_size = r.choice([2, 3, 5])
    open_groups = r.choice(range(1, groups + 1))
    cfg.update(n_group=groups, topk_group=open_groups, n_routed_experts=groups * group_size + (4 if groups == 1 else 0))
    most = cfg["n_routed_experts"] - 1 if groups == 1 else open_groups * group_size
    cfg["num_experts_per_tok"] = r.choice([k for k in (1, 2, 3, 5) if k <= most])
    return cfg | over


def deepseek_v2(d, r):
    cfg = mla(d, r, "DeepseekV2ForCausalLM", "deepseek_v2", scoring_func="softmax", norm_topk_prob=False,
              mlp_bias=r.random() < 0.3, topk_method=r.choice(["greedy", "group_limited_greedy"]))
    return cfg, rope_of(r, d.rope // 2, cfg, ["none", "linear", "yarn", "yarn", "yarn", "llama3"])


def deepseek_v3(d, r):
    cfg = mla(d, r, "DeepseekV3ForCausalLM", "deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc",
              norm_topk_prob=flag(r))
    if flag(r):
        cfg["rope_interleave"] = flag(r)
    return cfg, rope_of(r, d.rope // 2, cfg, ["none", "linear", "yarn", "yarn", "yarn", "llama3", "dynamic", "longrope"])


def kimi_k2(d, r):
    cfg, length = deepseek_v3(d, r)
    return cfg | {"model_type": "kimi_k2"}, length


def longcat_flash(d, r):
    cfg = tiny.longcat(
        d, num_layers=min(d.layers, 3), moe_topk=max(d.top_k, 2), n_routed_experts=d.experts, zero_expert_num=r.choice([0, 1, 3]),
        attention_bias=flag(r), router_bias=r.random() < 0.3, routed_scaling_factor=r.choice([1.0, 6.0]), rms_norm_eps=1e-5,
        hidden_act=r.choice(ACTIVATIONS), tie_word_embeddings=flag(r))
    return cfg, rope_of(r, d.rope // 2, cfg, ["none", "none", "yarn", "linear"])


def bailing_moe(d, r):
    cfg = tiny.bailing(
        d, num_hidden_layers=d.layers, num_experts=d.experts, num_experts_per_tok=d.top_k, tie_word_embeddings=flag(r),
        num_shared_experts=r.choice([0, 1, 3, None]), norm_topk_prob=flag(r), first_k_dense_replace=r.choice([0, 1]),
        use_qkv_bias=flag(r), use_bias=flag(r), norm_head=flag(r), rms_norm_eps=r.choice([1e-6, 1e-5]))
    cfg["norm_head"] = cfg["norm_head"] and not cfg["tie_word_embeddings"]
    length = rope_of(r, d.head_dim // 2, cfg, ["none", "linear", "yarn"])
    cfg.pop("original_max_position_embeddings", None)
    return cfg, length


def bailing_moe_v2(d, r):
    groups, group_size = r.choice([1, 2, 4]), r.choice([3, 4])
    top = r.choice(range(1, groups + 1))
    cfg = tiny.bailing_v2(
        d, num_hidden_layers=d.layers, num_experts=groups * group_size, n_group=groups, topk_group=top,
        num_experts_per_tok=r.choice([1, 2, 3]), tie_word_embeddings=flag(r), num_shared_experts=r.choice([0, 1, 2]),
        first_k_dense_replace=r.choice([0, 1]), use_qkv_bias=flag(r), use_bias=flag(r), use_qk_norm=flag(r),
        partial_rotary_factor=r.choice([0.5, 1.0]), routed_scaling_factor=r.choice([1.0, 2.5]))
    half = int(d.head_dim * cfg["partial_rotary_factor"]) // 2
    if half * 2 != d.head_dim * cfg["partial_rotary_factor"]:
        cfg["partial_rotary_factor"] = 1.0
    length = rope_of(r, half, cfg, ["none", "linear", "yarn"])
    cfg.pop("original_max_position_embeddings", None)
    return cfg, length


def pangu_ultra_moe(d, r):
    cfg = mla(d, r, "PanguUltraMoEForCausalLM", "pangu_ultra_moe", attention_bias=False, hidden_act="silu",
              sandwich_norm=flag(r), router_enable_expert_bias=flag(r), norm_topk_prob=flag(r),
              rope_theta=r.choice([1e4, 25.6e6]))
    for key in ("n_group", "topk_group", "rope_scaling"):
        cfg.pop(key, None)
    cfg["num_experts_per_tok"] = min(cfg["num_experts_per_tok"], cfg["n_routed_experts"])
    if flag(r):
        cfg = {tiny.PanguUltraMoe.ALIASES.get(key, key): value for key, value in cfg.items()}
    return cfg, None


SPACES = {space.__name__: space for space in (
    mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, granitemoeshared, deepseek_v2, deepseek_v3, kimi_k2, longcat_flash,
    bailing_moe, bailing_moe_v2, pangu_ultra_moe)}


def transformers5_spelling(cfg: Config) -> Config:
    """`rope_parameters` in place of `rope_theta` and `rope_scaling`."""
    cfg = copy.deepcopy(cfg)
    parameters = dict(cfg.pop("rope_scaling", None) or {"rope_type": "default"})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    parameters["rope_theta"] = cfg.pop("rope_theta")
    cfg["rope_parameters"] = parameters
    cfg["transformers_version"] = "5.23.0"
    return cfg


ALWAYS_PUBLISHED = {"model_type", "max_position_embeddings", "num_experts_per_tok", "num_local_experts", "num_experts",
                    "n_routed_experts", "moe_topk"}


def without_defaults(folder: Path, r: random.Random) -> None:
    """Drops some keys of config.json that say what their absence would say to transformers."""
    path = folder / "config.json"
    cfg = json.loads(path.read_text())
    defaults = type(tiny.hf_config(folder, cfg))().to_dict()
    kept = {key: value for key, value in cfg.items() if key in ALWAYS_PUBLISHED or key not in defaults
            or defaults[key] != value or flag(r)}
    tiny.dump(path, kept)


def resave(folder: Path, model: torch.nn.Module, storage: str) -> None:
    """What `save_pretrained` writes: config.json, and the tensors where that loses nothing."""
    if storage != "f32":
        config = copy.deepcopy(model.config)
        config.dtype = tiny.STORAGE[storage]
        config.save_pretrained(folder)
        return
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def fix_rope(model: torch.nn.Module, max_model_len: int) -> None:
    """Frequencies as for a sequence of `max_model_len` tokens, whatever the length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = model.model.rotary_emb
    frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS[rotary.rope_type](
        model.config, None, seq_len=max_model_len)
    rotary.inv_freq.copy_(frequencies)
    rotary.rope_type = "fixed"


def spread(folder: Path, layout: str) -> None:
    """Splits the tensors over shards with an index, or fuses the experts of a layer into two tensors, or does nothing."""
    path = folder / "model.safetensors"
    state = load_file(path)
    if layout == "fused":
        save_file(fuse(state), path, metadata={"format": "pt"})
    if layout == "sharded":
        names, count = sorted(state), 3
        files = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            save_file({n: state[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
        tiny.dump(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in state.values())}, "weight_map": files})
        path.unlink()


def fuse(state: tiny.State) -> tiny.State:
    """Experts stacked as transformers 5 holds them in memory: gate rows first, `[E, 2I, H]` and `[E, H, I]`."""
    out, apart = {}, {}
    for name, value in state.items():
        stem, found, rest = name.partition(".experts.")
        if found and rest.split(".")[0].isdigit():
            idx, part, _ = rest.split(".")
            apart.setdefault(stem, {})[int(idx), part] = value
        else:
            out[name] = value
    for stem, experts in apart.items():
        count = 1 + max(idx for idx, _ in experts)
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if (0, "gate_proj") in experts else ("w1", "w3", "w2")
        gate_up = [torch.cat((experts[e, gate], experts[e, up])) for e in range(count)]
        out[f"{stem}.experts.gate_up_proj"] = torch.stack(gate_up).contiguous()
        out[f"{stem}.experts.down_proj"] = torch.stack([experts[e, down] for e in range(count)]).contiguous()
    return out


def make(arch: str, seed: int, n: int, out: Path) -> str:
    r = random.Random(f"{arch}/{seed}/{n}")
    d = draw_dims(r)
    cfg, max_model_len = SPACES[arch](d, r)
    if tiny.ARCHS[arch].backend == "hf" and flag(r):
        cfg = transformers5_spelling(cfg)
    storage, layouts = r.choice(["bf16", "f16", "f32"]), ["plain", "sharded", "fused"]
    if tiny.ARCHS[arch].backend == "hf" and arch != "kimi_k2":
        layouts += ["resaved", "terse"] + ["unrenamed"] * (arch != "longcat_flash")
    layout = r.choice(layouts)
    name = f"{seed}.{n}"
    tiny.PROFILES["drawn"] = d
    tiny.ARCHS[arch].variants[name] = lambda _: Variant(copy.deepcopy(cfg), storage=storage)
    tiny.PROBE_CFG[arch] = cfg
    plain = tiny.hf_empty

    def fixed(folder: Path, config: Config) -> torch.nn.Module:
        model = plain(folder, config)
        if max_model_len is not None:
            fix_rope(model, max_model_len)
        return model
    tiny.hf_empty = fixed
    folder = out / f"{arch}-{name}"
    try:
        built = tiny.build(arch, name, "drawn", seed * 1000 + n, folder, attempts=ATTEMPTS)
    finally:
        tiny.hf_empty = plain
    tiny.write(built, folder, tiny.ARCHS[arch], f"unseen.py --arch {arch} --seed {seed}", seed, "drawn")
    spread(folder, layout)
    if layout == "resaved":
        resave(folder, built.runner.model, storage)
    if layout == "unrenamed":
        state = {name: value.contiguous() for name, value in tiny.hf_tensors(built.runner.model).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if layout == "terse":
        without_defaults(folder, r)
    reference = json.loads((folder / "reference.json").read_text())
    reference["layout"] = layout
    if max_model_len is not None:
        reference["max_model_len"] = max_model_len
    tiny.dump(folder / "reference.json", reference, compact=True)
    scaling = cfg.get("rope_scaling") or cfg.get("rope_parameters") or {}
    return f"{storage} {layout} {scaling.get('rope_type', scaling.get('type', 'default'))} {cfg.get('hidden_act')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="+", choices=sorted(SPACES), default=list(SPACES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="folders per architecture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for arch in args.arch:
        for n in range(args.count):
            begin = time.time()
            try:
                print(f"{arch}-{args.seed}.{n}: {make(arch, args.seed, n, args.out)}, {time.time() - begin:.1f}s", flush=True)
            except Exception as error:  # noqa: BLE001
                failed += 1
                print(f"{arch}-{args.seed}.{n}: FAILED {type(error).__name__}: {error}", flush=True)
                if os.environ.get("TINY_TRACE"):
                    raise
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
