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
from make_tiny import Config, Variant
from spaces import SPACES, draw_dims, flag

tiny.NEW_TOKENS = 12
tiny.MIN_MARGIN = 0.003
ATTEMPTS = 6
# Architectures whose tensors transformers 5 also loads by the names it has for them in memory.
UNRENAMED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "deepseek_v2", "deepseek_v3",
             "qwen3_next")


def transformers5_spelling(cfg: Config) -> Config:
    """`rope_parameters` in place of `rope_theta`, `rope_scaling` and `partial_rotary_factor`."""
    cfg = copy.deepcopy(cfg)
    if "text_config" in cfg:
        return cfg | {"text_config": transformers5_spelling(cfg["text_config"])}
    if cfg["model_type"] == "switch_transformers" or cfg["model_type"] == "gpt_oss" and "rope_scaling" not in cfg:
        return cfg
    parameters = dict(cfg.pop("rope_scaling", None) or {"rope_type": "default"})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    parameters["rope_theta"] = cfg.pop("rope_theta", 1e4)
    if "partial_rotary_factor" in cfg:
        parameters["partial_rotary_factor"] = cfg.pop("partial_rotary_factor")
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


def fix_routers(model: torch.nn.Module) -> None:
    """Routers that compute in float32, and decoders that take their tokens one at a time, so that none finds its expert full."""
    for name, module in model.named_modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.dtype = torch.float32
            if name.startswith("decoder."):
                module.expert_capacity = 1 << 30


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


def add_unused(folder: Path, cfg: Config) -> None:
    """Tensors of published checkpoints that serving has no use for."""
    path = folder / "model.safetensors"
    state = load_file(path)
    if cfg["model_type"] == "qwen3_next":
        norm = state["model.norm.weight"]
        state |= {"mtp.fc.weight": torch.cat((norm, norm))[None].repeat(len(norm), 1), "mtp.norm.weight": norm.clone(),
                  "mtp.layers.0.mlp.experts.0.up_proj.weight": norm[None].clone()}
    if cfg["model_type"] == "switch_transformers" and cfg.get("tie_word_embeddings", True):
        copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
        state |= {name: state["shared.weight"].clone() for name in copies}
    save_file(state, path, metadata={"format": "pt"})


def fuse(state: tiny.State) -> tiny.State:
    """Experts stacked as transformers 5 holds them in memory: gate rows first, `[E, 2I, H]` and `[E, H, I]`."""
    out, apart = {}, {}
    for name, value in state.items():
        stem, found, rest = name.partition(".experts.")
        if found and rest.split(".")[0].isdigit() and not name.startswith("mtp."):
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
    if tiny.ARCHS[arch].backend == "hf" and arch != "kimi_k2" and "quantization_config" not in cfg:
        layouts += ["resaved", "terse"] + ["unrenamed"] * (arch in UNRENAMED)
    layout = r.choice(layouts)
    style = tiny.T5STYLE if arch == "switch_transformers" else tiny.CHATML
    name = f"{seed}.{n}"
    tiny.PROFILES["drawn"] = d
    tiny.ARCHS[arch].variants[name] = lambda _: Variant(copy.deepcopy(cfg), storage=storage, style=style)
    tiny.PROBE_CFG[arch] = cfg
    plain = tiny.hf_empty

    def fixed(folder: Path, config: Config) -> torch.nn.Module:
        model = plain(folder, config)
        fix_routers(model)
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
    if flag(r):
        add_unused(folder, cfg)
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
