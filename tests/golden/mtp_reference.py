#!/usr/bin/env python3
"""Reference outputs of multi-token-prediction layers: writes mtp_reference.json into golden folders that hold some.

    mtp_reference.py FOLDER...

transformers has no such layers. The decoder layer within one is transformers' own (or make_tiny.py's, where transformers
has no such model); what stands around it is written out here after the published code: modeling_bailing_moe_v2.py of
Ling 2.0, and deepseek_mtp.py, glm4_moe_mtp.py and longcat_flash_mtp.py of vLLM. Layer k at position i takes the state
of position i (the model's after its last norm, or the layer's before) and token i + k + 1, and guesses token i + k + 2.
"""

import json
import sys
import tempfile
from pathlib import Path

import make_tiny as tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def attention_inputs(model, x: torch.Tensor) -> dict:
    """What a decoder layer of transformers wants beside its rows: the causal mask and the rotary tables."""
    count = x.shape[1]
    position_ids = torch.arange(count)[None]
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    return {"attention_mask": mask, "position_ids": position_ids,
            "position_embeddings": model.model.rotary_emb(x, position_ids)}


def longer_model(folder: Path, spec, cfg: dict, hub: dict):
    """The transformers model whose last decoder layers are those of the MTP layers."""
    longer = cfg | {"num_hidden_layers": cfg["num_hidden_layers"] + cfg["num_nextn_predict_layers"]}
    with tempfile.TemporaryDirectory() as scratch:
        tiny.dump(Path(scratch) / "config.json", longer)
        model = tiny.hf_empty(Path(scratch), longer)
    names = tiny.hf_tensors(model)
    filled = tiny.hub_to_model(hub, spec, {name: tuple(value.shape) for name, value in names.items()})
    with torch.no_grad():
        for name, value in filled.items():
            names[name].copy_(value)
    return model


def longcat_layer(model, cfg: dict, hub: dict):
    """One latent attention and one dense network, in modules of transformers."""
    double = model.model.layers[0]
    attention, mlp = double.self_attn[0], double.mlps[0]
    stem = "model.mtp.layers.0."
    for module, prefix in ((attention, "self_attn."), (mlp, "transformer_layer.mlp.")):
        module.load_state_dict({name: hub[stem + prefix + name] for name in module.state_dict()})

    def layer(x: torch.Tensor) -> torch.Tensor:
        norm = lambda part, value: tiny.rms_norm(value, hub[f"{stem}{part}.weight"], cfg["rms_norm_eps"])  # noqa: E731
        h = x + attention(norm("input_layernorm", x)[None], **attention_inputs(model, x[None]))[0][0]
        return h + mlp(norm("post_attention_layernorm", h))
    return layer


class Drafter:
    """The MTP layers of a folder."""

    def __init__(self, folder: Path):
        reference = json.loads((folder / "reference.json").read_text())
        self.cfg = cfg = json.loads((folder / "config.json").read_text())
        self.arch = reference["arch"]
        spec = tiny.ARCHS[self.arch]
        tiny.PROBE_CFG[spec.name] = cfg
        self.hub = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        self.base = tiny.load_runner(folder, spec, cfg)[0].model
        n = cfg.get("num_hidden_layers")
        self.hidden = lambda ids: self.base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        if self.arch == "longcat_flash":
            # A second model, whose modules get other weights.
            self.layers = [longcat_layer(tiny.load_runner(folder, spec, cfg)[0].model, cfg, self.hub)]
        elif spec.backend == "own":
            self.hidden = self.own_hidden
            self.layers = [lambda x, i=i: self.base.block(i, x, torch.arange(len(x)))
                           for i in range(n, n + cfg["num_nextn_predict_layers"])]
        else:
            model = longer_model(folder, spec, cfg, self.hub)
            self.layers = [lambda x, layer=layer: self.transformers_layer(model, layer, x) for layer in model.model.layers[n:]]

    def own_hidden(self, ids: list[int]) -> torch.Tensor:
        h, pos = self.base.embed(torch.tensor(ids)), torch.arange(len(ids))
        for i in range(self.cfg["num_hidden_layers"]):
            h = self.base.block(i, h, pos)
        return self.base.norm("model.norm", h)

    @staticmethod
    def transformers_layer(model, layer, x: torch.Tensor) -> torch.Tensor:
        out = layer(x[None], **attention_inputs(model, x[None]))
        return (out[0] if isinstance(out, tuple) else out)[0]

    def parts(self, k: int) -> tuple[str, str, str, str, bool]:
        """Names: prefix of the two norms, end of theirs, last norm, embedding; and whether the normed state is passed on."""
        if self.arch == "longcat_flash":
            return "model.mtp.layers.0.", ".m.weight", "model.mtp.norm.weight", "model.mtp.embed_tokens.weight", True
        stem = f"model.layers.{self.cfg['num_hidden_layers'] + k}."
        if self.arch == "bailing_moe_v2":
            return stem, ".weight", stem + "final_layernorm.weight", "", True
        return stem, ".weight", stem + "shared_head.norm.weight", stem + "embed_tokens.weight", False

    @torch.no_grad()
    def drafts(self, ids: list[int]) -> list[torch.Tensor]:
        """Logits of each layer, one row for every position that has a token to take."""
        norm = lambda name, x: tiny.rms_norm(x, self.hub[name], self.cfg["rms_norm_eps"])  # noqa: E731
        model_embedding = self.hub.get("model.embed_tokens.weight", self.hub.get("model.word_embeddings.weight"))
        hidden, out = self.hidden(ids), []
        for k, layer in enumerate(self.layers):
            stem, ending, last_norm, embedding, passes_normed = self.parts(k)
            tokens = torch.tensor(ids[k + 1:])
            embedded = self.hub.get(embedding, model_embedding)[tokens]
            both = torch.cat((norm(f"{stem}enorm{ending}", embedded), norm(f"{stem}hnorm{ending}", hidden[: len(tokens)])), -1)
            stream = layer(F.linear(both, self.hub[f"{stem}eh_proj.weight"]))
            normed = norm(last_norm, stream)
            head = self.hub.get(f"{stem}shared_head.head.weight", self.hub.get("lm_head.weight", model_embedding))
            out.append(F.linear(normed, head))
            hidden = normed if passes_normed else stream
        return out


def main() -> int:
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        drafter = Drafter(folder)
        prompts = {p["name"]: p["ids"] for p in json.loads((folder / "reference.json").read_text())["prompts"]}
        full, long = prompts["len7"], prompts["len33"]
        tiny.dump(folder / "mtp_reference.json", {
            "command": f"mtp_reference.py {folder.name}",
            "conventions": {"full": "logits of every layer at every position, [layer][position][vocab]",
                            "last": "logits of every layer at its last position, [layer][vocab]"},
            "full": {"ids": full, "logits": [tiny.rounded(rows) for rows in drafter.drafts(full)]},
            "last": {"ids": long, "logits": [tiny.rounded(rows[-1]) for rows in drafter.drafts(long)]}}, compact=True)
        print(folder.name, len(drafter.layers), "layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
