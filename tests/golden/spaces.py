"""Configurations drawn at random, one function per architecture: sizes, options and rotary scalings that `unseen.py` makes
checkpoints of. Each gives a hub-style config, and the served length where rotary frequencies follow from it.
"""

import random

import make_tiny as tiny
from make_tiny import Config, Dims

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
        use_qkv_bias=flag(r), use_bias=flag(r), norm_head=flag(r), rms_norm_eps=r.choice([1e-6, 1e-5]),
        hidden_act=r.choice(ACTIVATIONS))
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
        partial_rotary_factor=r.choice([0.5, 1.0]), routed_scaling_factor=r.choice([1.0, 2.5]),
        hidden_act=r.choice(ACTIVATIONS))
    half = int(d.head_dim * cfg["partial_rotary_factor"]) // 2
    if half * 2 != d.head_dim * cfg["partial_rotary_factor"]:
        cfg["partial_rotary_factor"] = 1.0
    length = rope_of(r, half, cfg, ["none", "linear", "yarn"])
    cfg.pop("original_max_position_embeddings", None)
    return cfg, length


def pangu_ultra_moe(d, r):
    cfg = mla(d, r, "PanguUltraMoEForCausalLM", "pangu_ultra_moe", attention_bias=False,
              sandwich_norm=flag(r), router_enable_expert_bias=flag(r), norm_topk_prob=flag(r),
              rope_theta=r.choice([1e4, 25.6e6]))
    for key in ("n_group", "topk_group", "rope_scaling"):
        cfg.pop(key, None)
    cfg["num_experts_per_tok"] = min(cfg["num_experts_per_tok"], cfg["n_routed_experts"])
    if flag(r):
        cfg = {tiny.PanguUltraMoe.ALIASES.get(key, key): value for key, value in cfg.items()}
    return cfg, None


# Of the rotary scalings, those whose frequencies follow from the config alone.
STATIC = ["none", "none", "linear", "yarn", "yarn", "llama3"]


def thin_out(r: random.Random, cfg: Config, **defaults) -> Config:
    """Leaves out some keys that say what their class takes for granted."""
    return {key: value for key, value in cfg.items()
            if key not in defaults or type(value) is not type(defaults[key]) or value != defaults[key] or flag(r)}


def other_spelling(r: random.Random, cfg: Config, key: str, alias: str) -> None:
    if flag(r):
        cfg[alias] = cfg.pop(key)


def jetmoe(d, r):
    kv = r.choice([1, 2, 3])
    cfg = dict(
        architectures=["JetMoeForCausalLM"], model_type="jetmoe", vocab_size=d.vocab, hidden_size=d.hidden,
        num_hidden_layers=d.layers, num_key_value_heads=kv, kv_channels=d.head_dim, intermediate_size=d.moe_inter,
        max_position_embeddings=4096, activation_function=r.choice(ACTIVATIONS), num_local_experts=d.experts,
        num_experts_per_tok=d.top_k, num_attention_heads=kv * d.top_k, tie_word_embeddings=flag(r),
        rms_norm_eps=r.choice([1e-6, 1e-3]), transformers_version="4.57.0")
    rope_of(r, d.head_dim // 2, cfg, STATIC)
    return thin_out(r, cfg, num_experts_per_tok=2, tie_word_embeddings=True, num_attention_heads=kv * d.top_k), None


def gpt_oss(d, r):
    is_mxfp4 = r.random() < 0.35
    cfg = base(
        d, r, "GptOssForCausalLM", "gpt_oss", head_dim=r.choice([d.head_dim, 64]), num_local_experts=d.experts,
        num_experts_per_tok=d.top_k, intermediate_size=d.moe_inter, attention_bias=r.choice([True, True, False]),
        sliding_window=r.choice([3, 16, 128]), swiglu_limit=r.choice([0.7, 2.0, 7.0]), swiglu_alpha=r.choice([1.702, 1.0]))
    if is_mxfp4:  # whole blocks of 32
        cfg.update(hidden_size=r.choice([32, 64, 96]), intermediate_size=r.choice([32, 96, 160]),
                   quantization_config={"quant_method": "mxfp4"})
    if flag(r):
        cfg["layer_types"] = [r.choice(["full_attention", "sliding_attention"]) for _ in range(d.layers)]
    rope_of(r, cfg["head_dim"] // 2, cfg, STATIC)
    if cfg["rope_scaling"] is None and flag(r):
        cfg["rope_scaling"] = {"rope_type": "default"}
    elif cfg["rope_scaling"] is None:  # the class has a scaling of its own
        del cfg["rope_scaling"]
    other_spelling(r, cfg, "num_local_experts", "num_experts")
    return thin_out(r, cfg, head_dim=64, num_experts_per_tok=4, attention_bias=True, swiglu_limit=7.0,
                    swiglu_alpha=1.702, sliding_window=128), None


def expert_groups(d: Dims, r: random.Random) -> Config:
    count = r.choice([n for n in (1, 2, 3, 4) if d.experts % n == 0 and d.experts // n >= 2])
    chosen = [top for top in range(1, count + 1) if top * (d.experts // count) >= d.top_k]
    return {"n_group": count, "topk_group": r.choice(chosen)}


def glm4_moe(d, r):
    cfg = base(
        d, r, "Glm4MoeForCausalLM", "glm4_moe", n_routed_experts=d.experts, n_shared_experts=r.choice([1, 1, 2, 3]),
        num_experts_per_tok=d.top_k, moe_intermediate_size=d.moe_inter, first_k_dense_replace=r.choice([0, 1, 1, d.layers]),
        norm_topk_prob=flag(r), routed_scaling_factor=r.choice([1.0, 2.5, 0.5]), attention_bias=flag(r),
        use_qk_norm=flag(r), num_nextn_predict_layers=r.choice([0, 1]), **expert_groups(d, r))
    half = head_half(d, cfg)
    cfg["partial_rotary_factor"] = r.choice([f for f in (0.5, 0.5, 1.0, 0.25) if int(2 * half * f) % 2 == 0])
    rope_of(r, int(half * cfg["partial_rotary_factor"]), cfg, STATIC)
    other_spelling(r, cfg, "n_routed_experts", "num_local_experts")
    return thin_out(r, cfg, partial_rotary_factor=0.5, n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True,
                    routed_scaling_factor=1.0, n_group=1, topk_group=1, use_qk_norm=False, rms_norm_eps=1e-5), None


def dots1(d, r):
    cfg = base(
        d, r, "Dots1ForCausalLM", "dots1", n_routed_experts=d.experts, n_shared_experts=r.choice([1, 2]),
        num_experts_per_tok=d.top_k, moe_intermediate_size=d.moe_inter, first_k_dense_replace=r.choice([0, 1, d.layers]),
        norm_topk_prob=flag(r), routed_scaling_factor=r.choice([1.0, 2.5]), attention_bias=flag(r),
        sliding_window=r.choice([None, 4, 20, 4096]), max_window_layers=r.choice([0, 1, 2, 62]),
        use_sliding_window=flag(r), scoring_func="noaux_tc", **expert_groups(d, r))
    if cfg["sliding_window"] and flag(r):
        cfg["layer_types"] = [r.choice(["full_attention", "sliding_attention"]) for _ in range(d.layers)]
    if flag(r) and d.kv_heads == d.heads:
        cfg["num_key_value_heads"] = None
    rope_of(r, head_half(d, cfg), cfg, STATIC)
    return thin_out(r, cfg, norm_topk_prob=False, first_k_dense_replace=0, routed_scaling_factor=1.0, n_group=1,
                    topk_group=1, sliding_window=4096, max_window_layers=62, rms_norm_eps=1e-6), None


def ernie4_5_moe(d, r):
    cfg = base(
        d, r, "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", moe_num_experts=d.experts, moe_k=d.top_k,
        moe_intermediate_size=d.moe_inter, moe_num_shared_experts=r.choice([0, 1, 2, 2, 3]),
        moe_layer_start_index=r.choice([0, 1, 1, 2]), moe_layer_end_index=r.choice([-1, -1, 1, d.layers - 1]),
        moe_layer_interval=r.choice([1, 1, 2, 3]), moe_norm_min=r.choice([1e-12, 0.3, 0.9]), use_bias=flag(r))
    rope_of(r, head_half(d, cfg), cfg, STATIC)
    other_spelling(r, cfg, "moe_num_experts", "num_experts")
    return thin_out(r, cfg, moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=-1,
                    moe_layer_interval=1, moe_norm_min=1e-12, use_bias=False, tie_word_embeddings=True,
                    rms_norm_eps=1e-5), None


def hunyuan_v1_moe(d, r):
    cfg = base(
        d, r, "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", num_experts=d.experts, intermediate_size=d.moe_inter,
        moe_topk=d.top_k, attention_bias=flag(r), use_qk_norm=flag(r), use_cla=flag(r), cla_share_factor=2,
        moe_intermediate_size=7, num_shared_expert=[1] * d.layers, norm_topk_prob=flag(r), mlp_bias=flag(r),
        head_dim=d.head_dim)
    if flag(r):
        cfg["moe_topk"] = [r.choice([1, d.top_k, d.experts]) for _ in range(d.layers)]
    rope_of(r, d.head_dim // 2, cfg, STATIC)
    if flag(r):
        cfg["rope_scaling"] = {"type": "dynamic", "alpha": r.choice([10.0, 1000.0]), "factor": 1.0, "beta_fast": 32,
                               "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    if d.kv_heads == d.heads and flag(r):
        del cfg["num_key_value_heads"]
    return thin_out(r, cfg, moe_topk=1, attention_bias=False, tie_word_embeddings=False, rms_norm_eps=1e-5,
                    use_qk_norm=True), None


def minimax_m2(d, r):
    cfg = base(
        d, r, "MiniMaxM2ForCausalLM", "minimax_m2", num_local_experts=d.experts, num_experts_per_tok=d.top_k,
        intermediate_size=d.moe_inter, head_dim=r.choice([d.head_dim, d.head_dim, 128]), use_qk_norm=True,
        scoring_func="sigmoid", use_routing_bias=True)
    cfg.update(r.choice([{}, {"rotary_dim": r.choice([4, 8, cfg["head_dim"]])},
                         {"partial_rotary_factor": r.choice([0.5, 1.0])}]))
    rope_of(r, cfg["head_dim"] // 2, cfg, STATIC)
    other_spelling(r, cfg, "num_local_experts", "num_experts")
    return thin_out(r, cfg, head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=False), None


def phimoe(d, r):
    cfg = base(
        d, r, "PhiMoEForCausalLM", "phimoe", num_local_experts=d.experts, num_experts_per_tok=2,
        intermediate_size=d.moe_inter, attention_bias=flag(r), lm_head_bias=flag(r),
        sliding_window=r.choice([None, None, 5, 100]), router_jitter_noise=r.choice([0.0, 0.01, 0.3]),
        input_jitter_noise=r.choice([0.0, 0.01]), rope_theta=r.choice([1e4, 1e6]))
    if flag(r):
        half = head_half(d, cfg)
        cfg["rope_scaling"] = {
            "type": "longrope", "short_factor": [1.0 + 0.05 * i for i in range(half)],
            "long_factor": [1.0 + 2.0 * i for i in range(half)], "short_mscale": r.choice([1.0, 1.24]),
            "long_mscale": 1.3, "original_max_position_embeddings": 1024}
        cfg["max_position_embeddings"] = 4096
        if flag(r):
            cfg["original_max_position_embeddings"] = 1024
    return thin_out(r, cfg, num_experts_per_tok=2, attention_bias=False, lm_head_bias=False, router_jitter_noise=0.01,
                    sliding_window=None, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_scaling=None), None


def llama4(d, r):
    cfg = base(
        d, r, "Llama4ForCausalLM", "llama4_text", intermediate_size=d.moe_inter, intermediate_size_mlp=d.inter,
        num_local_experts=d.experts, num_experts_per_tok=r.choice([1, 1, d.top_k]),
        interleave_moe_layer_step=r.choice([1, 1, 2]), no_rope_layer_interval=r.choice([4, 4, 2, 3]), use_qk_norm=flag(r),
        attention_chunk_size=r.choice([3, 16, 50, 8192]), attn_temperature_tuning=flag(r),
        floor_scale=r.choice([2, 16, 8192]), attn_scale=r.choice([0.1, 0.7]), attention_bias=flag(r),
        head_dim=r.choice([d.head_dim, 128]))
    if flag(r):
        cfg["moe_layers"] = [idx for idx in range(d.layers) if flag(r)]
    if flag(r):
        cfg["no_rope_layers"] = r.choice([[], [r.choice([0, 1]) for _ in range(d.layers)]])
    if flag(r):
        cfg["layer_types"] = [r.choice(["full_attention", "chunked_attention"]) for _ in range(d.layers)]
    rope_of(r, cfg["head_dim"] // 2, cfg, STATIC)
    cfg = thin_out(r, cfg, num_experts_per_tok=1, interleave_moe_layer_step=1, no_rope_layer_interval=4,
                   attention_chunk_size=8192, floor_scale=8192, attn_scale=0.1, head_dim=128, use_qk_norm=True,
                   attn_temperature_tuning=True, tie_word_embeddings=False)
    return multimodal(cfg) if flag(r) else cfg, None


def multimodal(text: Config) -> Config:
    """Llama 4 with its tiny vision tower, of which the checkpoint has nothing."""
    text = {key: value for key, value in text.items() if key != "architectures"}
    vision = dict(model_type="llama4_vision_model", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=32, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
                  image_size=28, patch_size=14)
    return dict(architectures=["Llama4ForConditionalGeneration"], model_type="llama4", text_config=text,
                vision_config=vision, boi_token_index=1, eoi_token_index=2, image_token_index=2,
                tie_word_embeddings=text.get("tie_word_embeddings", False), transformers_version="4.57.0")


def minicpm_moe(d, r):
    cfg = base(
        d, r, "MiniCPMForCausalLM", "minicpm", num_experts=d.experts, num_experts_per_tok=d.top_k,
        intermediate_size=d.moe_inter, scale_emb=r.choice([1, 12]), scale_depth=r.choice([1.0, 1.4, 3.0]),
        dim_model_base=r.choice([8, 64]), rope_theta=r.choice([1e4, 1e5]), attention_bias=flag(r),
        hidden_size=d.heads * 16)
    cfg.pop("head_dim", None)
    return cfg, None


def qwen3_next(d, r):
    key_heads = r.choice([1, 2, 3])
    layers = r.choice([1, 2, 3, 5])
    cfg = base(
        d, r, "Qwen3NextForCausalLM", "qwen3_next", num_hidden_layers=layers, head_dim=d.head_dim,
        linear_num_key_heads=key_heads, linear_num_value_heads=key_heads * r.choice([1, 1, 2, 3]),
        linear_key_head_dim=r.choice([4, 10, 16, 20, 33]), linear_value_head_dim=r.choice([5, 8, 16, 21, 40]),
        linear_conv_kernel_dim=r.choice([1, 2, 3, 4, 5, 8]), num_experts=d.experts, num_experts_per_tok=d.top_k,
        moe_intermediate_size=d.moe_inter, shared_expert_intermediate_size=r.choice([20, 35]), norm_topk_prob=flag(r),
        decoder_sparse_step=r.choice([1, 1, 2, 3]), mlp_only_layers=r.choice([[], None, [0], [1, 2]]),
        attention_bias=flag(r), full_attention_interval=r.choice([1, 2, 3, 4, 4, 9]), output_router_logits=False)
    if flag(r):
        kinds = r.choice([["linear_attention"], ["full_attention"], ["linear_attention", "full_attention"]])
        cfg["layer_types"] = [r.choice(kinds) for _ in range(layers)]
    factors = [f for f in (0.25, 0.25, 0.5, 1.0) if int(d.head_dim * f) % 2 == 0]
    cfg["partial_rotary_factor"] = r.choice(factors)
    half = int(d.head_dim * cfg["partial_rotary_factor"]) // 2
    length = rope_of(r, half, cfg, ROPES if half > 1 else STATIC)  # dynamic NTK needs more than one pair
    return thin_out(r, cfg, full_attention_interval=4, linear_conv_kernel_dim=4, decoder_sparse_step=1,
                    norm_topk_prob=True, partial_rotary_factor=0.25, attention_bias=False), length


# transformers' names but for those with weights of their own, and those made for attention and routers.
PLAIN_ACTIVATIONS = [
    "relu", "relu", "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh",
    "gelu_accurate", "hardswish", "leaky_relu", "linear", "mish", "quick_gelu", "relu2", "relu6", "sigmoid",
    "silu", "swish", "tanh"]


def switch_transformers(d, r):
    encoder, decoder = r.choice([1, 2, 3, 4, 6]), r.choice([1, 2, 3, 4, 6])
    if flag(r):
        decoder = encoder
    cfg = tiny.switch(
        d, d_kv=r.choice([4, 7, 16, 18]), num_layers=encoder, num_decoder_layers=decoder,
        num_sparse_encoder_layers=r.randint(0, encoder + 1), num_sparse_decoder_layers=r.randint(0, decoder + 1),
        num_experts=r.choice([1, 2, 3, 5, 8]), expert_capacity=r.choice([1, 2, 5, 64, 1000]), router_bias=flag(r),
        router_jitter_noise=r.choice([0.01, 0.5]), tie_word_embeddings=flag(r), dense_act_fn=r.choice(PLAIN_ACTIVATIONS),
        relative_attention_num_buckets=r.choice([32, 32, 4, 6, 13, 50]), layer_norm_epsilon=r.choice([1e-6, 1e-3]),
        relative_attention_max_distance=r.choice([128, 128, 30, 57, 400]), decoder_start_token_id=r.choice([0, 0, 1, 5]))
    for key in ("encoder_sparse_step", "decoder_sparse_step"):
        cfg[key] = r.choice([0, 1, 2, 3])
        if flag(r):
            del cfg[key]
    if flag(r):
        cfg["n_positions"] = r.choice([256, 1024])
    if encoder == decoder and flag(r):
        cfg["num_decoder_layers"] = None
    return thin_out(r, cfg, expert_capacity=64, router_bias=False, tie_word_embeddings=True, dense_act_fn="relu",
                    relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
                    num_experts=8, decoder_start_token_id=0), None


SPACES = {space.__name__: space for space in (
    mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, granitemoeshared, deepseek_v2, deepseek_v3, kimi_k2, longcat_flash,
    bailing_moe, bailing_moe_v2, pangu_ultra_moe, jetmoe, gpt_oss, glm4_moe, dots1, ernie4_5_moe, hunyuan_v1_moe, minimax_m2,
    phimoe, llama4, minicpm_moe, qwen3_next, switch_transformers)}
