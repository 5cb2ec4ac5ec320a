"""What a trained model is worth, measured: in training's own numbers, and as Moesaic serves its packed folder.

Everything goes to `figures.json`, part by part, so that what was measured before a stop is not measured again; `card.py`
makes the model card of it.
"""

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
NUM_LOGPROBS = 20
NUM_STARTS = 5
# As the program serves the model that is inside it.
AS_DEMO = ("--kv-cache-memory", "32MiB")
# Of answers in the card, by kind.
SAMPLES = {"story": 12, "fact": 3, "talk": 3, "task": 2}
STREAMS = 16
PORT = 8731


@torch.no_grad()
def drafts_accepted(model, data: Data, device: torch.device) -> float:
    """Share of the tokens of held-out answers where the MTP layer's best token, given the one before, is the model's own
    choice."""
    agreed = total = 0
    for batch in data.held_out:
        ids, real = padded(batch, device)
        with autocast(device):
            logits, ahead, _ = model(ids, real)
        # Row i of `ahead` has read token i + 1 and guesses what row i + 1 of the model chooses for token i + 2.
        same = (ahead.argmax(-1) == logits[:, 1:].argmax(-1))[:, :-1]
        answers = is_answer(ids)[:, 2:]
        agreed += int((same & answers).sum())
        total += int(answers.sum())
    return agreed / total


def is_answer(ids: torch.Tensor) -> torch.Tensor:
    """Whether each token is one that the model says: behind an `<|assistant|>`, with the `<|end|>`."""
    begun = (ids == corpus.ASSISTANT).int().cumsum(1) - (ids == corpus.ASSISTANT).int()
    ended = (ids == corpus.END).int().cumsum(1) - (ids == corpus.END).int()
    return begun > ended


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


def asked(documents: list[dict], kind: str, count: int) -> list[dict]:
    """Documents of a kind with different first questions, in a fixed random order."""
    found = {one["turns"][0][0]: one for one in documents if one["kind"].startswith(kind)}
    asks = sorted(found)
    random.Random(0).shuffle(asks)
    return [found[text] for text in asks[:count]]


def first_asks(documents: list[dict]) -> list[str]:
    return [one["turns"][0][0] for one in documents]


def served(moesaic: str, packed: Path, writer: Path, work: Path, documents: list[dict]) -> dict:
    held_out = [one for one in documents if one["held_out"]]
    learned = [one["turns"][0][1] for one in documents if not one["held_out"] and one["kind"].startswith("story")]
    of_stories = asked(held_out, "story", NUM_PROMPTS)
    out: dict = {}
    with write.Server(moesaic, packed, PORT, work / "serve.log") as server:
        stories = chats(server.address, first_asks(of_stories))
        talks = chats(server.address, first_asks(asked(held_out, "", NUM_PROMPTS)))
        samples = [one for kind, count in SAMPLES.items() for one in asked(held_out, kind, count)]
        answers = chats(server.address, first_asks(samples))
        out["samples"] = [
            {"ask": text, "answer": answer, "finish": finish}
            for text, (answer, finish) in zip(first_asks(samples), answers)
        ]
    # The writer's answers to the same questions. An answer without text has no tokens to judge.
    ours = [text for text in (corpus.clean(text) for text, _ in stories) if text]
    own = [one["turns"][0][1] for one in of_stories]
    with write.Server(moesaic, writer, PORT, work / "serve.log") as server:
        out["judged"] = {
            "ours": perplexity(server.address, ours),
            "writer": perplexity(server.address, own),
            "num_ours": len(ours),
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


def server(moesaic: str, work: Path, packed: Path, documents: list[dict]) -> dict:
    """Times and memory of the packed folder, served as the program serves the model inside it."""
    asks = first_asks(asked([one for one in documents if one["held_out"]], "", NUM_PROMPTS))
    out: dict = {"ready_seconds": []}
    for _ in range(NUM_STARTS):
        start = time.monotonic()
        with write.Server(moesaic, packed, PORT, work / "serve.log", options=AS_DEMO):
            out["ready_seconds"].append(time.monotonic() - start)
    with write.Server(moesaic, packed, PORT, work / "serve.log", options=AS_DEMO) as running:
        out["resident_bytes_ready"] = resident_bytes(running.process.pid)
        report = work / "bench.json"
        bench = [moesaic, "bench", "--url", f"http://{running.address}", "--concurrency", "1", "--prompt-tokens", "32"]
        subprocess.run([*bench, "--output-tokens", "256", "--json", report], check=True, stdout=subprocess.DEVNULL)
        out["bench"] = json.loads(report.read_text())
        chats(running.address, asks)
        out["resident_bytes"], out["num_chats"] = resident_bytes(running.process.pid), len(asks)
    return out


def resident_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def quantization(moesaic: str, folder: Path, packed: Path, documents: list[dict], work: Path) -> dict:
    """KL divergence from the float folder and greedy agreement with it on held-out text: of the float folder quantized while it
    loads, and of the packed folder that is shipped."""
    text = work / "held_out.txt"
    text.write_text("\n".join(answer for one in documents if one["held_out"] for _, answer in one["turns"]))
    out = {}
    for name, options in {
        "int8": [folder, "--quant", "int8"],
        "int4": [folder, "--quant", "int4"],
        "packed int4": [packed],
    }.items():
        command = [moesaic, "eval", *options, "--against", folder, "--file", text, "--json", "--context", "512"]
        out[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return out


@torch.no_grad()
def reference(moesaic: str, folder: Path, model, data: Data, work: Path) -> dict:
    """On held-out conversations, transformers beside training's own definition (all log-probabilities) and beside the served
    float folder (those of the tokens that are there, and of the most probable ones); and whether 32 greedy tokens are the same."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    of_training, of_server, same = 0.0, 0.0, 0
    rows = [data.held_rows.alone(index)[:200] for index in range(NUM_REFERENCES)]
    with write.Server(moesaic, folder, PORT, work / "serve.log", dtype="f32") as server:
        for ids in rows:
            body = {
                "prompt": ids,
                "max_tokens": 32,
                "temperature": 0,
                "prompt_logprobs": NUM_LOGPROBS,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            choice = ask(server.address, "/v1/completions", body)["choices"][0]
            expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            trained_rows = model(torch.tensor([ids]))[0][0].log_softmax(-1)
            of_training = max(of_training, (trained_rows - expected).abs().max().item())
            for position, row in enumerate(choice["prompt_logprobs"][1:]):
                for token, entry in row.items():
                    of_server = max(of_server, abs(entry["logprob"] - expected[position, int(token)].item()))
            more = theirs.generate(
                torch.tensor([ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
            )
            same += more[0, len(ids) :].tolist() == choice["token_ids"]
    return {"training": of_training, "server": of_server, "same_greedy": same, "num_prompts": len(rows)}


@torch.no_grad()
def measured(kind: str, work: Path, data: Data, device: torch.device) -> dict:
    """What training left of a model."""
    model = trained(work, kind).to(device)
    total, active = model.num_parameters()
    state = torch.load(work / kind / "checkpoint.pt", map_location="cpu", weights_only=True)
    out = {
        "parameters": total,
        "mtp_parameters": sum(parameter.numel() for parameter in model.mtp.parameters()),
        "active_parameters": active,
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": state["seconds"],
        "machine": state["machine"],
        "held_out_perplexity": float(np.exp(held_out_loss(model, data, device))),
    }
    if kind == "moe":
        out["drafts_accepted"] = drafts_accepted(model, data, device)
        out["routing"] = routing(model, data, device)
    return out


def evaluate(moesaic: str, work: Path, folder: Path, packed: Path, writer: Path):
    data, device = load_data(work), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = json.loads((work / "corpus.json").read_text())
    path = work / "figures.json"
    newest = max((work / kind / "checkpoint.pt").stat().st_mtime for kind in ("moe", "dense"))
    fresh = path.exists() and path.stat().st_mtime > newest
    figures: dict = json.loads(path.read_text()) if fresh else {}
    parts = {
        "statistics": lambda: json.loads((work / "statistics.json").read_text()),
        "moe": lambda: measured("moe", work, data, device),
        "dense": lambda: measured("dense", work, data, device),
        "reference": lambda: reference(moesaic, folder, trained(work, "moe"), data, work),
        "quantization": lambda: quantization(moesaic, folder, packed, documents, work),
        "served": lambda: served(moesaic, packed, writer, work, documents),
        "server": lambda: server(moesaic, work, packed, documents),
    }
    for name, part in parts.items():
        if name not in figures:
            print(f"figures: {name}", flush=True)
            figures[name] = part()
            path.write_text(json.dumps(figures, indent=1) + "\n")
