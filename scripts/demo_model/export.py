"""Writes a trained model as the folder of a published checkpoint, in f32."""

import json
from pathlib import Path

import corpus
import torch
from model import Model, Shape, published
from safetensors.torch import save_file
from tokenizers import Tokenizer


def trained(work: Path, kind: str) -> Model:
    shape = Shape() if kind == "moe" else Shape().dense()
    model = Model(shape)
    model.load_state_dict(torch.load(work / kind / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
    return model.eval()


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(work: Path, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = published(trained(work, "moe"))
    names = corpus.SPECIAL_TOKENS
    tokens = {"pad_token_id": corpus.PAD, "bos_token_id": corpus.BOS, "eos_token_id": corpus.END}
    write_json(folder / "config.json", config | tokens)
    write_json(folder / "generation_config.json", tokens | {"do_sample": True, "temperature": 0.7, "top_p": 0.95})
    added = {
        str(id): {
            "content": name,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for id, name in enumerate(names)
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": corpus.MAX_LEN,
        "pad_token": names[corpus.PAD],
        "bos_token": names[corpus.BOS],
        "eos_token": names[corpus.END],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
        "chat_template": corpus.CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    Tokenizer.from_file(str(work / "tokenizer.json")).save(str(folder / "tokenizer.json"))
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
