"""From what was written to what is learned from: filters, the split by prompt, the tokenizer, and rows of token ids."""

import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(6)
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('this model knows the roles system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_LEN = 1024
SYSTEMS = {
    "story": ("You tell short stories to small children.", "You are a storyteller.", "Tell stories with simple words."),
    "fact": ("Explain things with simple words.", "You answer questions in one or two sentences."),
    "talk": ("You are a kind storyteller.", "Be friendly."),
    "task": ("Do what you are asked, with simple words.", "Answer briefly."),
}
# Shares of documents.
SYSTEM_SHARE = 0.15
PLAIN_SHARE = 0.1
ALONE_SHARE = 0.5

REPLACED = {"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "…": "...", "é": "e", "\u00a0": " "}
# What shows a model, a company or another world in the text of a child's storyteller.
UNWANTED = re.compile(
    r"smollm|hugging ?face|language model|\bA\.?I\b|chatbot|as an assistant|https?:|www\.|[#*`<>|{}\[\]]|\bsex|\bkill|"
    r"\bgun\b|\bdrug|\bnazi|\brape|\bsuicid|\bnaked|\bslave|\bblood",
    re.IGNORECASE,
)
ENDS = (".", "!", "?", '."', '!"', '?"', ".'", "!'", "?'")
MIN_STORY_WORDS = 25
MIN_CUT_WORDS = 40
MIN_DISTINCT = 0.8


def clean(text: str) -> str:
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def distinct_3(words: list[str]) -> float:
    """Share of the runs of three words that occur for the first time."""
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(set(runs)) / len(runs) if runs else 1.0


def whole_sentences(text: str) -> str:
    """Without a sentence that was cut off."""
    end = max(text.rfind(mark) + len(mark) for mark in ENDS if mark in text) if any(m in text for m in ENDS) else 0
    return text[:end]


def fault(answer: str, is_story: bool) -> str | None:
    """Why an answer is not learned from."""
    words = answer.split()
    if not answer.isascii():
        return "other letters"
    if UNWANTED.search(answer):
        return "unwanted words"
    if not words or len(words) < (MIN_STORY_WORDS if is_story else 1):
        return "too short"
    if len(words) > 20 and distinct_3(words) < MIN_DISTINCT:
        return "repeats itself"
    if not answer.endswith(ENDS) and len(words) > 6:
        return "no end"
    return None


def turns_of(document: dict) -> tuple[list[tuple[str, str]], str | None]:
    """The turns of a document that are good, and why the first bad one is not."""
    turns = []
    for index, (ask, answer) in enumerate(zip(document["asks"], document["answers"])):
        is_story = index == 0 and document["kind"].startswith("story")
        answer, is_last = clean(answer), index == len(document["asks"]) - 1
        if is_last and document["finish"] != "stop":
            answer = whole_sentences(answer)
            if not answer or (is_story and len(answer.split()) < MIN_CUT_WORDS):
                return turns, "cut off"
        why = fault(answer, is_story)
        if why:
            return turns, why
        turns.append((ask, answer))
    return turns, None


def read(path: Path) -> tuple[list[dict], dict[str, Counter]]:
    """Documents as `{id, kind, theme, held_out, turns}`, and how many were left out, whole or from a later turn on, why."""
    kept, seen = [], set()
    faults = {"whole": Counter(), "later_turns": Counter()}
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        turns, why = turns_of(document)
        if why:
            faults["later_turns" if turns else "whole"][why] += 1
        if not turns:
            continue
        key = re.sub(r"\W+", " ", turns[0][1].lower()) if len(turns[0][1].split()) > 8 else turns[0]
        if key in seen:
            faults["whole"]["seen before"] += 1
            continue
        seen.add(key)
        kept.append({name: document[name] for name in ("id", "kind", "theme", "held_out")} | {"turns": turns})
    # The order in which they were finished depends on the machine.
    return sorted(kept, key=lambda one: one["id"]), faults


def train_tokenizer(documents: list[dict]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for document in documents if not document["held_out"] for turn in document["turns"] for text in turn)
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, BOS)]
    )
    return tokenizer


class Rows:
    """Conversations of token ids, made anew for every pass over the documents."""

    def __init__(self, documents: list[dict], tokenizer: Tokenizer):
        self.documents = documents
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.turns = [
            [([USER, *self.encode(ask), ASSISTANT], [*self.encode(answer), END]) for ask, answer in document["turns"]]
            for document in documents
        ]
        self.systems = {kind: [[SYSTEM, *self.encode(text)] for text in texts] for kind, texts in SYSTEMS.items()}

    def num_tokens(self) -> int:
        """Of all documents, each alone."""
        return sum(1 + sum(len(ask) + len(answer) for ask, answer in turns) for turns in self.turns)

    def alone(self, index: int) -> list[int]:
        return ([BOS] + [id for turn in self.turns[index] for part in turn for id in part])[:MAX_LEN]

    def conversations(self, seed: str) -> list[list[int]]:
        """All documents once: alone, as plain text, under a system message, or one after the other in one conversation."""
        draw = random.Random(seed)
        order = list(range(len(self.documents)))
        draw.shuffle(order)
        rows, row, wanted = [], [BOS], 0
        for index in order:
            kind = self.documents[index]["kind"].split("_")[0]
            if kind == "story" and draw.random() < PLAIN_SHARE:
                rows.append([BOS, *self.turns[index][0][1]][:MAX_LEN])
                continue
            ids = self.alone(index)[1:]
            if len(row) > 1 and len(row) + len(ids) > wanted:
                rows.append(row)
                row = [BOS]
            if len(row) == 1:
                wanted = 0 if draw.random() < ALONE_SHARE else draw.randint(256, MAX_LEN)
                if draw.random() < SYSTEM_SHARE:
                    row += draw.choice(self.systems[kind])
            row = (row + ids)[:MAX_LEN]
        return [*rows, row]


def batches(rows: list[list[int]], tokens: int, seed: str) -> list[list[list[int]]]:
    """Rows of like length together, at most `tokens` with their padding, in random order."""
    draw = random.Random(seed)
    ordered = sorted(rows, key=lambda row: (len(row), draw.random()))
    out, batch = [], []
    for row in ordered:
        if batch and (len(batch) + 1) * len(row) > tokens:
            out.append(batch)
            batch = []
        batch.append(row)
    out.append(batch)
    draw.shuffle(out)
    return out
