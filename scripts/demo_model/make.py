#!/usr/bin/env python3
"""Makes the demonstration model from nothing: `python3 make.py --work DIR`, with `moesaic` built before.

Stages: text (SmolLM2 writes it), corpus, moe and dense (training), figures, folder. Each goes on from where it was when it was
stopped, and what is finished is not done again but for the folder; `--minutes` stops text and training after that time, with exit
status 3, and figures come in parts of a few minutes each.
"""

import argparse
import csv
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WRITER_TOKENS = 3_710_000
MIN_TOKENS = 4_000_000
MAX_BYTES = 16 << 20
NUM_SAMPLES = 50


class Maker:
    def __init__(self, work: Path, moesaic: str, out: Path, minutes: float):
        self.work, self.moesaic, self.out = work, moesaic, out
        self.end = time.monotonic() + minutes * 60

    def seconds_left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def text(self):
        import write

        path = self.work / "written.jsonl"
        if write.written(path)[1] >= WRITER_TOKENS:
            return
        writer = write.writer_model(self.moesaic, self.work)
        with write.Server(self.moesaic, writer, 8730, self.work / "serve.log") as server:
            write.write(f"http://{server.address}", path, WRITER_TOKENS, self.seconds_left())
        if write.written(path)[1] < WRITER_TOKENS:
            sys.exit(3)

    def corpus(self):
        path = self.work / "statistics.json"
        if path.exists() and path.stat().st_mtime > (self.work / "written.jsonl").stat().st_mtime:
            return
        import corpus

        documents, left_out = corpus.read(self.work / "written.jsonl")
        tokenizer = corpus.train_tokenizer(documents)
        tokenizer.save(str(self.work / "tokenizer.json"))
        (self.work / "corpus.json").write_text(json.dumps(documents))
        held_out = [one for one in documents if one["held_out"]]
        statistics = {
            "documents": len(documents),
            "tokens": corpus.Rows(documents, tokenizer).num_tokens(),
            "held_out_documents": len(held_out),
            "held_out_tokens": corpus.Rows(held_out, tokenizer).num_tokens(),
            "characters": sum(len(text) for one in documents for turn in one["turns"] for text in turn),
            "kinds": Counter(one["kind"] for one in documents),
            "themes": Counter(one["theme"] for one in documents if one["theme"]),
            "left_out": {what: dict(faults.most_common()) for what, faults in left_out.items()},
        }
        if statistics["tokens"] < MIN_TOKENS:
            raise SystemExit(f"{statistics['tokens']:,} tokens are fewer than {MIN_TOKENS:,}; raise WRITER_TOKENS")
        path.write_text(json.dumps(statistics, indent=1) + "\n")

    def train(self, kind: str):
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, script, kind, self.work, "--minutes", str(self.seconds_left() / 60)]
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)

    def figures(self):
        import evaluate
        import export
        import write

        folder, packed = self.work / "float", self.work / "packed"
        export.export(self.work, folder)
        shutil.rmtree(packed, ignore_errors=True)
        subprocess.run([self.moesaic, "quantize", folder, "--to", "int4", "--out", packed], check=True)
        evaluate.evaluate(self.moesaic, self.work, folder, packed, write.writer_model(self.moesaic, self.work))

    def folder(self):
        import card
        import pictures

        partial = self.out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.work / "packed", partial)
        pictures.draw(self.work, partial)
        card.write_card(self.work, partial)
        shutil.copy(self.work / "figures.json", partial)
        shutil.copy(self.work / "moe" / "samples.csv", partial)
        shutil.copy(self.work / "statistics.json", partial / "data_statistics.json")
        documents = json.loads((self.work / "corpus.json").read_text())
        samples = random.Random(0).sample(documents, NUM_SAMPLES)
        lines = (json.dumps({"kind": one["kind"], "theme": one["theme"], "turns": one["turns"]}) for one in samples)
        (partial / "data_samples.jsonl").write_text("\n".join(lines) + "\n")
        with (partial / "training.csv").open("w", newline="") as out:
            rows = [
                {"model": kind} | row
                for kind in ("moe", "dense")
                for row in csv.DictReader((self.work / kind / "log.csv").open())
            ]
            writer = csv.DictWriter(out, list(rows[0]), restval="")
            writer.writeheader()
            writer.writerows(rows)
        num_bytes = sum(file.stat().st_size for file in partial.iterdir())
        if num_bytes > MAX_BYTES:
            raise SystemExit(f"{partial} has {num_bytes / 2**20:.1f} MiB, more than {MAX_BYTES >> 20}")
        shutil.rmtree(self.out, ignore_errors=True)
        partial.rename(self.out)
        print(f"{self.out}: {num_bytes / 2**20:.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the text, checkpoints and logs")
    parser.add_argument("--moesaic", default=str(REPOSITORY / "target/release/moesaic"), help="the program to use")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "models/moesaic-tiny", help="folder to write, replaced"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; run again to go on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    maker = Maker(args.work, args.moesaic, args.out, args.minutes)
    maker.text()
    maker.corpus()
    maker.train("moe")
    maker.train("dense")
    maker.figures()
    maker.folder()
    return 0


if __name__ == "__main__":
    sys.exit(main())
