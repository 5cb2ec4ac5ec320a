"""Makes WORK/written.jsonl of the parts beside this script."""

import bz2
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import prompts  # noqa: E402
import write  # noqa: E402


def parts() -> list[Path]:
    return sorted(HERE.glob("part-*.jsonl.bz2"))


def lines(part: Path) -> list[list]:
    return [json.loads(line) for line in bz2.open(part, "rt", encoding="utf-8")]


def document(line: list) -> dict:
    id, tokens, finish, answers = line
    plan = prompts.plan(write.SEED, id)
    return {
        "id": id,
        "kind": plan.kind,
        "theme": plan.theme,
        "held_out": plan.held_out,
        "asks": [turn.ask for turn in plan.turns[: len(answers)]],
        "answers": answers,
        "finish": finish,
        "tokens": tokens,
    }


def main():
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    with (work / "written.jsonl").open("x", encoding="utf-8") as out:
        for part in parts():
            out.writelines(json.dumps(document(line), ensure_ascii=False) + "\n" for line in lines(part))
    print(f"{write.written(work / 'written.jsonl')[1]:,} tokens")


if __name__ == "__main__":
    main()
