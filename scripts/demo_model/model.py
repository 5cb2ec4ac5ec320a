"""The DeepSeek-V3 architecture, written out for training: latent attention, sigmoid routing with a bias that balances
the load, one shared and many small routed experts, and a layer that predicts one token further (MTP).

Weights have the shapes of published checkpoints; those of a layer's routed experts are stacked. With `num_experts = 0`
it is the dense model of the same active parameters that training is compared with.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes, named as in config.json where that has them."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    dense_width: int = 768
    expert_width: int = 96
    num_experts: int = 32
    top_k: int = 4
    routed_scaling_factor: float = 2.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 1024

    def dense(self) -> "Shape":
        """As many active parameters without a choice: networks as wide as the shared and the chosen experts together, and
        as many parameters more as a router has."""
        width = self.expert_width * (1 + self.top_k) + round(self.num_experts / 3)
        return Shape(**(asdict(self) | {"num_experts": 0, "expert_width": width}))


def rotary(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[positions, rope dims / 2]`."""
    half = torch.arange(0, shape.qk_rope_head_dim, 2, device=device).float() / shape.qk_rope_head_dim
    angles = torch.arange(shape.max_positions, device=device).float()[:, None] / shape.rope_theta**half
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs of the last axis of `[..., positions, dims]`, and puts all first ones before all second
    ones: queries and keys alike, so that their products are those of the published layout."""
    cos, sin = (part[: x.shape[-2]].to(x.dtype) for part in table)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.5 * inputs**-0.5)
    return layer


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        qk = s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = linear(s.hidden_size, s.q_lora_rank)
        self.q_a_layernorm = Norm(s.q_lora_rank, s.rms_norm_eps)
        self.q_b_proj = linear(s.q_lora_rank, s.num_heads * qk)
        self.kv_a_proj_with_mqa = linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim)
        self.kv_a_layernorm = Norm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = linear(s.kv_lora_rank, s.num_heads * (s.qk_nope_head_dim + s.v_head_dim))
        self.o_proj = linear(s.num_heads * s.v_head_dim, s.hidden_size)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        s, (batch, count, _) = self.shape, x.shape
        heads = lambda y: y.view(batch, count, s.num_heads, -1).transpose(1, 2)
        q = heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))))
        q_nope, q_rope = q.split((s.qk_nope_head_dim, s.qk_rope_head_dim), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((s.kv_lora_rank, s.qk_rope_head_dim), -1)
        kv = heads(self.kv_b_proj(self.kv_a_layernorm(latent)))
        k_nope, v = kv.split((s.qk_nope_head_dim, s.v_head_dim), -1)
        k_rope = rotate(k_rope, table)[:, None].expand(-1, s.num_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, table)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        out = F.scaled_dot_product_attention(q, k, v.contiguous(), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))


class Mlp(nn.Module):
    def __init__(self, s: Shape, width: int):
        super().__init__()
        self.gate_proj = linear(s.hidden_size, width)
        self.up_proj = linear(s.hidden_size, width)
        self.down_proj = linear(width, s.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    """`bias` moves only the choice of experts; `loads` are the tokens of each in training since it was last moved."""

    def __init__(self, s: Shape):
        super().__init__()
        self.shape = s
        self.gate = linear(s.hidden_size, s.num_experts)
        # Published experts are [gate; up] and down of each; here [experts, inputs, outputs], what a grouped product takes.
        self.gate_up = nn.Parameter(
            torch.randn(s.num_experts, s.hidden_size, 2 * s.expert_width) * 0.5 * s.hidden_size**-0.5
        )
        self.down = nn.Parameter(torch.randn(s.num_experts, s.expert_width, s.hidden_size) * 0.5 * s.expert_width**-0.5)
        self.shared_experts = Mlp(s, s.expert_width)
        self.register_buffer("bias", torch.zeros(s.num_experts))
        self.register_buffer("loads", torch.zeros(s.num_experts), persistent=False)
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Also the loss of uneven use within each sequence. `real` is true where a token is no padding."""
        s, (batch, count, size) = self.shape, x.shape
        flat = x.reshape(-1, size)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(flat.float(), self.gate.weight.float()).sigmoid()
        chosen = (scores.detach() + self.bias).topk(s.top_k, sorted=False).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * s.routed_scaling_factor
        self.chosen = chosen.view(batch, count, s.top_k)
        balance = self.count(scores.view(batch, count, -1), real)
        order = chosen.flatten().argsort(stable=True)
        ends = chosen.flatten().bincount(minlength=s.num_experts).cumsum(0).int()
        rows = order // s.top_k
        inner = grouped(flat[rows], self.gate_up, ends)
        gate, up = inner.chunk(2, -1)
        out = grouped(F.silu(gate) * up, self.down, ends)
        out = out * weights.flatten()[order].to(out.dtype)[:, None]
        routed = torch.zeros_like(flat, dtype=out.dtype).index_add(0, rows, out)
        return self.shared_experts(x) + routed.view_as(x), balance

    def count(self, scores: Tensor, real: Tensor | None) -> Tensor:
        s = self.shape
        use = F.one_hot(self.chosen, s.num_experts).sum(2).float()
        mask = torch.ones_like(use[..., :1]) if real is None else real[..., None].float()
        if self.training:
            self.loads += (use * mask).sum((0, 1))
        lengths = mask.sum(1).clamp(min=1)
        share = (use * mask).sum(1) / lengths * s.num_experts / s.top_k
        probable = (scores / scores.sum(-1, keepdim=True) * mask).sum(1) / lengths
        return (share * probable).sum(-1).mean()

    @torch.no_grad()
    def rebalance(self, speed: float):
        """Makes experts that had more than their share less likely to be chosen, and the others more."""
        self.bias += speed * (self.loads.mean() - self.loads).sign()
        self.loads.zero_()


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows with its own matrix; `ends` are where the groups end."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return F.grouped_mm(x.to(dtype), weights.to(dtype), offs=ends)
    # Split and unbound at once: the gradient of a slice is as large as what it was cut from.
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights.unbind())])


class Block(nn.Module):
    def __init__(self, s: Shape, dense: bool):
        super().__init__()
        self.input_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        if dense:
            self.mlp = Mlp(s, s.dense_width)
        else:
            self.mlp = Moe(s) if s.num_experts else Mlp(s, s.expert_width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), table)
        out = self.mlp(self.post_attention_layernorm(x), *([real] if isinstance(self.mlp, Moe) else []))
        out, balance = out if isinstance(out, tuple) else (out, None)
        return x + out, balance


class Mtp(nn.Module):
    """From the state of position i and token i + 1 to the state that guesses token i + 2."""

    def __init__(self, s: Shape):
        super().__init__()
        self.enorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.hnorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.eh_proj = linear(2 * s.hidden_size, s.hidden_size)
        self.block = Block(s, dense=False)
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)


class Model(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Block(shape, dense=index == 0) for index in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = linear(shape.hidden_size, shape.vocab_size)
        self.mtp = Mtp(shape)

    def moes(self) -> list[Moe]:
        """Of all layers, that of the MTP layer last."""
        return [block.mlp for block in (*self.layers, self.mtp.block) if isinstance(block.mlp, Moe)]

    def forward(self, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the next token `[batch, count, vocab]`; those of the one after it, one position fewer; and the mean
        loss of uneven use."""
        state, ahead, unevenness = self.states(ids, real)
        return self.lm_head(state), self.lm_head(ahead), unevenness

    def states(self, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same before the head: `[batch, count, hidden]`."""
        table = rotary(self.shape, ids.device)
        embedded = self.embed_tokens(ids)
        x, uneven = embedded, []
        for block in self.layers:
            x, balance = block(x, table, real)
            uneven.append(balance)
        normed = self.norm(x)
        both = torch.cat((self.mtp.enorm(embedded[:, 1:]), self.mtp.hnorm(normed[:, :-1])), -1)
        ahead, balance = self.mtp.block(self.mtp.eh_proj(both), table, None if real is None else real[:, 1:])
        uneven = [part for part in (*uneven, balance) if part is not None]
        unevenness = torch.stack(uneven).mean() if uneven else x.new_zeros(())
        return normed, self.mtp.norm(ahead), unevenness

    def num_parameters(self) -> tuple[int, int]:
        """In all, MTP layer included, and those active for a token without the MTP layer."""
        total = sum(parameter.numel() for parameter in self.parameters())
        active = total - sum(parameter.numel() for parameter in self.mtp.parameters())
        if self.shape.num_experts:
            idle = 1 - self.shape.top_k / self.shape.num_experts
            experts = (moe.gate_up.numel() + moe.down.numel() for moe in self.moes()[:-1])
            active -= int(idle * sum(experts))
        return total, active


def published(model: Model) -> tuple[dict, dict[str, Tensor]]:
    """config.json and tensors as DeepSeek-V3 checkpoints have them, `bias` under its long name, MTP behind the layers."""
    s = model.shape
    tensors = {}
    for name, value in model.state_dict().items():
        name = name.replace("mtp.block.", f"layers.{s.num_layers}.").replace(
            "mlp.bias", "mlp.gate.e_score_correction_bias"
        )
        name = name.replace("mtp.norm.", f"layers.{s.num_layers}.shared_head.norm.").replace(
            "mtp.", f"layers.{s.num_layers}."
        )
        name = name if name.startswith("lm_head") else f"model.{name}"
        stem, _, last = name.rpartition(".")
        if last in ("gate_up", "down"):
            for index, matrix in enumerate(value.transpose(1, 2)):
                parts = (
                    dict(zip(("gate_proj", "up_proj"), matrix.chunk(2))) if last == "gate_up" else {"down_proj": matrix}
                )
                for part, rows in parts.items():
                    tensors[f"{stem}.experts.{index}.{part}.weight"] = rows.contiguous()
        else:
            tensors[name] = value
    # Checkpoints repeat what the MTP layer shares with the model.
    tensors[f"model.layers.{s.num_layers}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{s.num_layers}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": s.vocab_size,
        "hidden_size": s.hidden_size,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "num_hidden_layers": s.num_layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_heads,
        "q_lora_rank": s.q_lora_rank,
        "kv_lora_rank": s.kv_lora_rank,
        "qk_nope_head_dim": s.qk_nope_head_dim,
        "qk_rope_head_dim": s.qk_rope_head_dim,
        "v_head_dim": s.v_head_dim,
        "n_routed_experts": s.num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": s.top_k,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": s.routed_scaling_factor,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_theta": s.rope_theta,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "float32",
    }
    return config, tensors
