"""Trains one model on the corpus, in steps that can be interrupted: `python3 train.py moe|dense WORK [--minutes M]`.

It goes on from its last checkpoint. WORK holds `corpus.json` and `tokenizer.json`; the checkpoint, the log and the samples of
a run are under WORK/moe or WORK/dense.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from model import Model, Shape
from muon import optimizers
from tokenizers import Tokenizer
from torch import Tensor

SEED = 7
# As many as fit an hour and a half on two cores.
EPOCHS = 1.4
BATCH_TOKENS = 8192
MUON_LR = 0.02
ADAM_LR = 3e-3
WARMUP_STEPS = 40
FINAL_LR = 0.02
MTP_WEIGHT = (0.3, 0.1)
BALANCE_WEIGHT = 1e-3
BIAS_SPEED = 2e-3
SAVE_SECONDS = 120
# Rows whose logits are held at a time.
HEAD_ROWS = 512
EVALUATE_EVERY = 100
SAMPLE_PROMPTS = (
    "Tell me a story about a shy fox and a lantern.",
    "What does an owl eat?",
    "I am sad because my cat ran away.",
)


@dataclass(frozen=True)
class Data:
    rows: corpus.Rows
    held_rows: corpus.Rows
    held_out: list[list[list[int]]]
    tokenizer: Tokenizer


def load_data(work: Path) -> Data:
    documents = json.loads((work / "corpus.json").read_text())
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    kept = corpus.Rows([one for one in documents if one["held_out"]], tokenizer)
    alone = [kept.alone(index) for index in range(len(kept.documents))]
    learned = corpus.Rows([one for one in documents if not one["held_out"]], tokenizer)
    return Data(learned, kept, corpus.batches(alone, BATCH_TOKENS, "held out"), tokenizer)


def padded(batch: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and whether each is no padding."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [corpus.PAD] * (width - len(row)) for row in batch], device=device)
    return ids, ids != corpus.PAD


def losses(model: Model, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens: of the next one, of the one after it; and the loss of uneven use, a mean."""
    state, ahead, uneven = model.states(ids, None if bool(real.all()) else real)
    wanted = ids.masked_fill(~real, -1)
    # The function computes gradients where a weight may have them, whatever is made of the result.
    head = model.lm_head.weight if torch.is_grad_enabled() else model.lm_head.weight.detach()
    entropy = lambda rows, targets: HeadEntropy.apply(rows.flatten(0, 1).float(), head, targets.flatten())
    return entropy(state[:, :-1], wanted[:, 1:]), entropy(ahead[:, :-1], wanted[:, 2:]), uneven


class HeadEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of a linear head, its gradients computed on the way: a part's logits are gone before they
    leave the cache. Targets below 0 do not count."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = rows.new_zeros(())
        of_rows, of_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for part, wanted, of_part in zip(*(whole.split(HEAD_ROWS) for whole in (rows, targets, of_rows))):
            logits = F.linear(part, weight).float()
            counts = (wanted >= 0).float()[:, None]
            wanted = wanted.clamp(min=0)[:, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += ((log_sum - logits.gather(1, wanted)) * counts).sum()
            if any(ctx.needs_input_grad):
                errors = logits.sub_(log_sum).exp_().scatter_add_(1, wanted, -torch.ones_like(log_sum)).mul_(counts)
                of_part.copy_(errors @ weight)
                of_weight += errors.T @ part
        ctx.save_for_backward(of_rows, of_weight)
        return total

    @staticmethod
    def backward(ctx, factor: Tensor):
        of_rows, of_weight = ctx.saved_tensors
        return of_rows * factor, of_weight * factor, None


def autocast(device: torch.device):
    """bf16 where the device is known to multiply it fast."""
    enabled = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def held_out_loss(model: Model, data: Data, device: torch.device) -> float:
    """Nats per token."""
    total, count = 0.0, 0
    for batch in data.held_out:
        ids, real = padded(batch, device)
        with autocast(device):
            loss, _, _ = losses(model, ids, real)
        total, count = total + loss.item(), count + int(real[:, 1:].sum())
    return total / count


@torch.no_grad()
def sample(model: Model, data: Data, prompt: str, device: torch.device, max_tokens: int = 120) -> str:
    draw = torch.Generator().manual_seed(SEED)
    ids = [corpus.BOS, corpus.USER, *data.rows.encode(prompt), corpus.ASSISTANT]
    start = len(ids)
    while len(ids) < start + max_tokens:
        with autocast(device):
            # The layer that looks ahead wants two tokens at least.
            logits = model(torch.tensor([ids], device=device))[0][0, -1].float().cpu()
        ids.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1, generator=draw)))
        if ids[-1] == corpus.END:
            break
    return data.tokenizer.decode(ids[start:])


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} cores of {names[0] if names else 'a CPU'}"


class Run:
    """One model on its way."""

    def __init__(self, kind: str, work: Path, data: Data, device: torch.device):
        self.folder = work / kind
        self.folder.mkdir(exist_ok=True)
        self.data, self.device = data, device
        torch.manual_seed(SEED)
        shape = Shape() if kind == "moe" else Shape().dense()
        self.model = Model(shape).to(device)
        self.optimizers = optimizers(self.model, MUON_LR, ADAM_LR)
        epochs = [
            corpus.batches(data.rows.conversations(f"{SEED} {epoch}"), BATCH_TOKENS, f"{SEED} {epoch}")
            for epoch in range(math.ceil(EPOCHS))
        ]
        num_steps = round(EPOCHS * len(epochs[0]))
        self.plan = [batch for epoch in epochs for batch in epoch][:num_steps]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        lengths = [[len(row) for row in batch] for batch in self.plan]
        self.plan_hash = hashlib.sha256(json.dumps([lengths, self.plan[0]]).encode()).hexdigest()
        self.checkpoint = self.folder / "checkpoint.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=device, weights_only=True)
            if state["plan"] != self.plan_hash:
                raise SystemExit(f"{self.checkpoint} is of another corpus or another number of passes; remove {self.folder}")
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(kept)
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "plan": self.plan_hash,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "machine": machine(self.device),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def share(self) -> float:
        return self.step / len(self.plan)

    def learn(self) -> dict[str, float]:
        """One step."""
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS)
        rate *= FINAL_LR + (1 - FINAL_LR) * (0.5 + 0.5 * math.cos(math.pi * self.share()))
        for optimizer, base in zip(self.optimizers, (MUON_LR, ADAM_LR)):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        ids, real = padded(self.plan[self.step], self.device)
        with autocast(self.device):
            loss, ahead, uneven = losses(self.model, ids, real)
        count = int(real[:, 1:].sum())
        further = max(1, int(real[:, 2:].sum()))
        weight = MTP_WEIGHT[0] if self.share() < 0.5 else MTP_WEIGHT[1]
        (loss / count + weight * ahead / further + BALANCE_WEIGHT * uneven).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"step {self.step}: the gradient is no number")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loads = [moe.loads / moe.loads.mean() for moe in self.model.moes()]
        for moe in self.model.moes():
            # Towards the end choices stand still.
            moe.rebalance(BIAS_SPEED * min(1.0, 2 * (1 - self.share())))
        self.step, self.tokens = self.step + 1, self.tokens + count
        unevenness = {f"load_{index}": load.max().item() for index, load in enumerate(loads)}
        return {"loss": loss.item() / count, "mtp_loss": ahead.item() / further, **unevenness}

    def append(self, name: str, rows: list[dict]):
        """To a table of this run. Steps after the last checkpoint are taken again: what they left goes."""
        path = self.folder / name
        old = [] if not path.exists() else list(csv.DictReader(path.open(encoding="utf-8", newline="")))
        old = [row for row in old if int(row["step"]) < self.step]
        with path.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows([*old, *rows])

    def evaluate(self, measured: dict[str, float]):
        self.model.eval()
        measured |= {"held_out_loss": held_out_loss(self.model, self.data, self.device)}
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        self.append("log.csv", [row | {name: round(value, 4) for name, value in measured.items()}])
        if self.step % (2 * EVALUATE_EVERY) == 0 or self.step == len(self.plan):
            texts = [sample(self.model, self.data, prompt, self.device) for prompt in SAMPLE_PROMPTS]
            self.append(
                "samples.csv",
                [{"step": self.step, "prompt": prompt, "text": text} for prompt, text in zip(SAMPLE_PROMPTS, texts)],
            )
        self.model.train()
        print(f"\n{self.step} of {len(self.plan)}: held out {measured['held_out_loss']:.3f}", flush=True)

    def run(self, seconds: float) -> bool:
        """Whether it is finished."""
        saved = mark = time.monotonic()
        end = mark + seconds
        sums: dict[str, float] = {}
        since = 0
        while self.step < len(self.plan) and mark < end:
            measured = self.learn()
            sums = {name: sums.get(name, 0.0) + value for name, value in measured.items()}
            since += 1
            if sys.stdout.isatty() or self.step % 10 == 0:
                left = self.seconds / self.step * (len(self.plan) - self.step)
                print(
                    f"\rstep {self.step} of {len(self.plan)}  loss {measured['loss']:.3f}  mtp {measured['mtp_loss']:.3f}  "
                    f"{self.tokens / max(self.seconds, 1):.0f} tokens/s  {left / 60:.0f} min left ",
                    end="",
                    flush=True,
                )
            if self.step % EVALUATE_EVERY == 0 or self.step == len(self.plan):
                self.evaluate({name: value / since for name, value in sums.items()})
                sums, since = {}, 0
            # Evaluations and checkpoints are part of the time that training takes.
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if now - saved > SAVE_SECONDS or self.step == len(self.plan):
                self.save()
                saved = now
        self.save()
        print()
        return self.step == len(self.plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("moe", "dense"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(args.kind, args.work, load_data(args.work), device)
    total, active = run.model.num_parameters()
    print(
        f"{args.kind}: {total:,} parameters, {active:,} active; {len(run.plan)} steps, from step {run.step}, on {device.type}"
    )
    return 0 if run.run(args.minutes * 60) else 3


if __name__ == "__main__":
    sys.exit(main())
