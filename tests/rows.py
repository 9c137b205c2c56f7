"""Files of rows."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from prefix_tuning import bundled

GOOD = {"instruction": "一加一等于几？", "input": "", "output": "二"}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def questions(count):
    lines = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines()[:count]
    names = [None, "sentence", "base", "short"]
    return [json.loads(line) | {"prefix": names[index % 4], "id": index} for index, line in enumerate(lines)]


def write_rows(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
