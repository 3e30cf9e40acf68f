"""The leaderboard: every method that needs no training at equal multiply-adds, on every task, with ranks and measured times.

    python benchmarks/leaderboard.py [--tasks cells]        # benchmarks/results/leaderboard.json and one page a task beside it

DINOv2 ViT-S/14. A linear probe on the unreduced model's features judges emoji at 112 pixels and solar cells at 168 and 112;
photographs at 224 are judged by how near their features stay. Emoji: the preset was chosen on images of fold 0 (search.py), this
tests on fold 1. Cells: some that the probe is fitted on were chosen on, none that are tested. Photographs: those crops of
scikit-image's that search.py did not see, and as many of scikit-learn's two, of which it saw none. Ranks are by paired tests of
all pairs within a share, corrected for their number. Times are alternating rounds of all methods. Tasks that are in the file
already and are not asked for stay.
"""

from pathlib import Path

from squeezevit.bench.machine import write_json
from squeezevit.compare import Asked, compare, write_page
from tasks import TRIALS, trial
from workshop import RESULTS, arguments, earlier, say, untrained


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="*", choices=TRIALS, default=TRIALS)
    parser.add_argument("--shares", nargs="*", type=float, default=(0.65, 0.5, 0.44, 0.35, 0.25))
    parser.add_argument("--methods", nargs="*", choices=untrained(), default=untrained())
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=(1, 16))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "leaderboard.json")
    parser.add_argument("--pages", type=Path, help="a folder for a page of each task")
    args = parser.parse_args()
    found = earlier(args.json)
    asked = Asked(tuple(args.methods), tuple(args.shares), tuple(args.batch_sizes), args.rounds)
    for task in args.tasks:
        t = trial(task)
        judge = {} if t.probe is None else {"labels": t.probe.labels, "answer": t.probe.predict}
        found[task] = compare(t.model, t.batches, asked, image_size=t.size, progress=_told(task), **judge)
        write_json(args.json, found)
        if args.pages is not None:
            args.pages.mkdir(parents=True, exist_ok=True)
            write_page(found[task], args.pages / f"{task.replace(' ', '-')}.html", f"DINOv2 ViT-S/14, {task}")


def _told(task: str):
    def report(what: str, done: int, total: int) -> None:
        if done == total:
            say(f"{task}: {what}")

    return report


if __name__ == "__main__":
    main()
