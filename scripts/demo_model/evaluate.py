"""What a trained model is worth, measured: in training's own numbers, and as Moesaic serves its packed folder.

Everything goes to `figures.json`, the pictures beside it; `card.py` makes the model card of them.
"""

import csv
import http.client
import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import corpus
import numpy as np
import prompts
import torch
import write
from export import trained
from train import Data, autocast, held_out_loss, load_data, padded

NUM_PROMPTS = 200
NUM_SHUFFLES = 200
NUM_REFERENCES = 8
STREAMS = 16
PORT = 8731


@torch.no_grad()
def drafts_accepted(model, data: Data, device: torch.device) -> float:
    """Share of positions where the MTP layer's best token, given the next one, is the model's own choice after it."""
    agreed = total = 0
    for batch in data.held_out:
        ids, real = padded(batch, device)
        with autocast(device):
            logits, ahead, _ = model(ids, real)
        # Row i of `ahead` has read token i + 1 and guesses what row i + 1 of the model chooses.
        same = ahead.argmax(-1) == logits[:, 1:].argmax(-1)
        agreed += int((same & real[:, 1:]).sum())
        total += int(real[:, 1:].sum())
    return agreed / total


@torch.no_grad()
def routing(model, data: Data, device: torch.device) -> dict:
    """Loads of each layer on held-out text; and of stories, how much a token's expert tells of its story's theme."""
    themes = sorted(prompts.THEMES)
    num_layers, num_experts = len(model.moes()), model.shape.num_experts
    per_document = []
    loads = torch.zeros(num_layers, num_experts)
    for index, document in enumerate(data.held_rows.documents):
        ids = data.held_rows.alone(index)
        with autocast(device):
            model(torch.tensor([ids], device=device))
        counts = torch.stack([moe.chosen.flatten().bincount(minlength=num_experts) for moe in model.moes()]).cpu()
        loads += counts
        if document["theme"]:
            per_document.append((themes.index(document["theme"]), counts.numpy().astype(float)))
    labels = np.array([theme for theme, _ in per_document])
    counts = np.stack([count for _, count in per_document])
    draw = np.random.default_rng(0)
    information = lambda order: mutual_information(counts, order, len(themes))
    shuffled = np.stack([information(draw.permutation(labels)) for _ in range(NUM_SHUFFLES)])
    shares = (loads / loads.mean(1, keepdim=True)).numpy()
    return {
        "max_over_mean": shares.max(1).tolist(),
        "min_over_mean": shares.min(1).tolist(),
        "loads": shares.tolist(),
        "information_bits": information(labels).tolist(),
        "shuffled_mean_bits": shuffled.mean(0).tolist(),
        "shuffled_p99_bits": np.quantile(shuffled, 0.99, axis=0).tolist(),
        "themes": themes,
        "by_theme": theme_shares(counts, labels, len(themes)).tolist(),
    }


def theme_shares(counts: np.ndarray, labels: np.ndarray, num_themes: int) -> np.ndarray:
    """`[theme, layer, expert]`, each theme's tokens shared among the experts of a layer."""
    sums = np.stack([counts[labels == theme].sum(0) for theme in range(num_themes)])
    return sums / np.maximum(sums.sum(-1, keepdims=True), 1)


def mutual_information(counts: np.ndarray, labels: np.ndarray, num_themes: int) -> np.ndarray:
    """Of theme and expert, in bits, for each layer."""
    joint = np.stack([counts[labels == theme].sum(0) for theme in range(num_themes)])  # [theme, layer, expert]
    joint = joint / joint.sum((0, 2), keepdims=True)
    apart = joint.sum(2, keepdims=True) * joint.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(joint > 0, joint * np.log2(joint / apart), 0.0)
    return parts.sum((0, 2))


def ask(address: str, path: str, body: dict) -> dict:
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    reply = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"{path}: {reply}")
    return reply


def many(work, items: list) -> list:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(work, items))


def chats(address: str, asks: list[str]) -> list[tuple[str, str]]:
    """Answers with why they ended, as a client without settings of its own gets them."""

    def one(item: tuple[int, str]) -> tuple[str, str]:
        index, text = item
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 400, "temperature": 0.7, "seed": index}
        choice = ask(address, "/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"].strip(), choice["finish_reason"]

    return many(one, list(enumerate(asks)))


def perplexity(address: str, texts: list[str]) -> float:
    """Of all texts, each by itself, to the model that is served there."""

    def one(text: str) -> tuple[float, int]:
        reply = ask(address, "/v1/completions", {"prompt": text, "max_tokens": 1, "prompt_logprobs": 0})
        rows = [next(iter(row.values()))["logprob"] for row in reply["choices"][0]["prompt_logprobs"] if row]
        return sum(rows), len(rows)

    sums = many(one, texts)
    return float(np.exp(-sum(total for total, _ in sums) / sum(count for _, count in sums)))


def distinct_3(texts: list[str], num_words: int) -> float:
    """Of the first so many words of all texts: it depends on how many there are."""
    words = [word for text in texts for word in text.split()]
    if len(words) < num_words:
        raise ValueError(f"{len(words)} words are fewer than {num_words}")
    return corpus.distinct_3(words[:num_words])


def asked(documents: list[dict], kind: str | None, count: int) -> list[str]:
    """Different first questions of documents in a fixed random order."""
    found = sorted({one["turns"][0][0] for one in documents if kind is None or one["kind"].startswith(kind)})
    random.Random(0).shuffle(found)
    return found[:count]


def served(moesaic: str, packed: Path, writer: Path, work: Path, documents: list[dict]) -> dict:
    held_out = [one for one in documents if one["held_out"]]
    learned = [one["turns"][0][1] for one in documents if not one["held_out"] and one["kind"].startswith("story")]
    own = [one["turns"][0][1] for one in held_out if one["kind"].startswith("story")][:NUM_PROMPTS]
    out: dict = {}
    start = time.monotonic()
    with write.Server(moesaic, packed, PORT, work / "serve.log") as server:
        out["ready_seconds"] = time.monotonic() - start
        stories = chats(server.address, asked(held_out, "story", NUM_PROMPTS))
        talks = chats(server.address, asked(held_out, None, NUM_PROMPTS))
        status = Path(f"/proc/{server.process.pid}/status")
        if status.exists():
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
            out["resident_mib"] = int(line.split()[1]) / 1024
        report = work / "bench.json"
        bench = [moesaic, "bench", "--url", f"http://{server.address}", "--concurrency", "1", "--prompt-tokens", "32"]
        subprocess.run([*bench, "--output-tokens", "256", "--json", report], check=True, stdout=subprocess.DEVNULL)
        out["bench"] = json.loads(report.read_text())
        samples = (
            asked(held_out, "story", 12)
            + asked(held_out, "fact", 3)
            + asked(held_out, "talk", 3)
            + asked(held_out, "task", 2)
        )
        out["samples"] = [
            {"ask": text, "answer": answer, "finish": finish}
            for text, (answer, finish) in zip(samples, chats(server.address, samples))
        ]
    with write.Server(moesaic, writer, PORT, work / "serve.log") as server:
        out["judged"] = {
            "ours": perplexity(server.address, [corpus.clean(text) for text, _ in stories]),
            "writer": perplexity(server.address, own),
            "num_ours": len(stories),
            "num_writer": len(own),
        }
    num_words = sum(len(text.split()) for text, _ in stories)
    out["distinct_3"] = {
        "ours": distinct_3([text for text, _ in stories], num_words),
        "training_text": distinct_3(random.Random(0).sample(learned, len(learned)), num_words),
        "num_words": num_words,
    }
    out["ended"] = {
        "stories": sum(finish == "stop" for _, finish in stories) / len(stories),
        "prompts": sum(finish == "stop" for _, finish in talks) / len(talks),
        "num_prompts": len(talks),
    }
    return out


def quantization(moesaic: str, folder: Path, documents: list[dict], work: Path) -> dict:
    """KL divergence and greedy agreement of the packed formats on held-out stories."""
    text = work / "held_out.txt"
    text.write_text("\n".join(answer for one in documents if one["held_out"] for _, answer in one["turns"]))
    out = {}
    for quant in ("int8", "int4"):
        command = [
            moesaic,
            "eval",
            folder,
            "--against",
            folder,
            "--file",
            text,
            "--quant",
            quant,
            "--json",
            "--context",
            "512",
        ]
        out[quant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return out


@torch.no_grad()
def reference(moesaic: str, folder: Path, data: Data, work: Path) -> dict:
    """Largest difference between transformers' log-probabilities and those of the served float folder, and whether 32
    greedy tokens are the same, on held-out conversations."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    largest, same, rows = 0.0, 0, [data.held_rows.alone(index)[:200] for index in range(NUM_REFERENCES)]
    with write.Server(moesaic, folder, PORT, work / "serve.log", dtype="f32") as server:
        for ids in rows:
            body = {
                "prompt": ids,
                "max_tokens": 32,
                "temperature": 0,
                "prompt_logprobs": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            choice = ask(server.address, "/v1/completions", body)["choices"][0]
            expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            for position, row in enumerate(choice["prompt_logprobs"][1:], 1):
                found = row[str(ids[position])]["logprob"]
                largest = max(largest, abs(found - expected[position - 1, ids[position]].item()))
            more = theirs.generate(
                torch.tensor([ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
            )
            same += more[0, len(ids) :].tolist() == choice["token_ids"]
    return {"largest_difference": largest, "same_greedy": same, "num_prompts": len(rows)}


def training_curves(work: Path) -> dict[str, list[dict]]:
    return {kind: list(csv.DictReader((work / kind / "log.csv").open())) for kind in ("moe", "dense")}


def evaluate(moesaic: str, work: Path, folder: Path, packed: Path, writer: Path):
    data, device = load_data(work), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = json.loads((work / "corpus.json").read_text())
    figures: dict = {"statistics": json.loads((work / "statistics.json").read_text())}
    for kind in ("moe", "dense"):
        model = trained(work, kind).to(device)
        total, active = model.num_parameters()
        last = training_curves(work)[kind][-1]
        figures[kind] = {
            "parameters": total,
            "active_parameters": active,
            "steps": int(last["step"]),
            "tokens": int(last["tokens"]),
            "seconds": float(last["seconds"]),
            "held_out_perplexity": float(np.exp(held_out_loss(model, data, device))),
        }
        if kind == "moe":
            figures["drafts_accepted"] = drafts_accepted(model, data, device)
            figures["routing"] = routing(model, data, device)
    figures["reference"] = reference(moesaic, folder, data, work)
    figures["quantization"] = quantization(moesaic, folder, documents, work)
    figures |= served(moesaic, packed, writer, work, documents)
    (work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
