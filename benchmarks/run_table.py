"""Print the stages and the steps of a run as a table: seconds, and the peak of the memory of all tensors (on a CPU, of
the process).

    python benchmarks/run_table.py OUTPUT_DIR
"""

import json
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    print(f"| {folder.name} | seconds | memory, GiB | loss | gradient norm |\n|---|---|---|---|---|")
    for file in ("stages.jsonl", "metrics.jsonl"):
        for line in (folder / file).read_text().splitlines():
            row = json.loads(line)
            columns = [f"{row.get('stage', 'training')}, step {row['step']}"]
            columns += [f"{row['seconds']:.2f}", f"{row['memory'] / 2**30:.1f}"]
            for name in ("loss", "grad_norm"):
                value = row.get(name)  # a stage has none, and a step that overflowed has no norm
                columns.append("" if value is None else f"{value:.5g}")
            print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
