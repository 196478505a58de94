"""Speed, run by hand: python tests/bench.py scenes

scenes  generated scenes per second in one process, at 64 and 256 pixels
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldmseg import ShapeScenes  # noqa: E402


def scenes():
    for size, count in ((64, 500), (256, 100)):
        dataset = ShapeScenes("train", size)
        start = time.perf_counter()
        for index in range(count):
            dataset[index]
        print(f"{size} pixels: {count / (time.perf_counter() - start):.0f} scenes per second")


if __name__ == "__main__":
    benchmarks = {"scenes": scenes}
    if sys.argv[1:] not in [[name] for name in benchmarks]:
        sys.exit(__doc__)
    benchmarks[sys.argv[1]]()
