"""Adds a part with the documents of WORK/written.jsonl that no part has."""

import bz2
import json
import sys
from pathlib import Path

import unpack


def main():
    parts = unpack.parts()
    known = {line[0] for part in parts for line in unpack.lines(part)}
    written = (Path(sys.argv[1]) / "written.jsonl").read_bytes().split(b"\n")[:-1]
    news = [one for one in map(json.loads, written) if one["id"] not in known]
    assert all(unpack.document([one["id"], one["tokens"], one["finish"], one["answers"]]) == one for one in news)
    # Like texts side by side are smaller.
    news.sort(key=lambda one: (one["kind"], one["theme"], one["id"]))
    lines = ([one["id"], one["tokens"], one["finish"], one["answers"]] for one in news)
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    part = unpack.HERE / f"part-{len(parts) + 1}.jsonl.bz2"
    part.write_bytes(bz2.compress(text.encode(), 9))
    print(f"{part.name}: {len(news):,} documents, {sum(one['tokens'] for one in news):,} tokens, {part.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
