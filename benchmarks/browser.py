"""What a visitor of the page waits for: int8 against float in chromium, and each method against the unreduced model.

python benchmarks/browser.py --keep FOLDER   # benchmarks/results/browser.json

DINOv2 ViT-S/14 at 224 pixels, on scikit-image's photograph of a cat, by onnxruntime-web on one thread. Times are milliseconds of
one forward; the models of one page alternate. Cosine is that of features with the same page's unreduced ones; `rounding` is that of
int8 features with float ones.
"""

import functools
import http.server
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, sync_playwright

from squeezevit.bundle import card_of
from squeezevit.core.reducer import Reducer
from squeezevit.data.dinov2 import dinov2_vit_small
from squeezevit.page import graphs, job
from workshop import RESULTS, Sheet, arguments


def build(folder: Path, precisions: tuple[str, ...], shares: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """A page for each precision, of the same exported graphs; their manifests."""
    model, exported = dinov2_vit_small(224), graphs.exported
    known: dict[Reducer, tuple[dict[str, Any], bytes]] = {}

    def once(net: Any, reducer: Reducer, images: Any, scratch: Path) -> dict[str, Any]:
        file = scratch / "model.onnx"
        if reducer not in known:
            known[reducer] = exported(net, reducer, images, scratch), file.read_bytes()
        file.write_bytes(known[reducer][1])
        return dict(known[reducer][0])

    graphs.exported = once
    return {
        p: job.build(
            model, card_of(model), folder / p, job.Wanted(shares=shares, precision=p), "DINOv2 ViT-S/14", lambda *said: None
        )
        for p in precisions
    }


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def measure(browser: Browser, folder: Path, stop: int, rounds: int) -> dict[str, Any]:
    """What a page saves with its slider at a stop, after so many measurements of five rounds."""
    context = browser.new_context(service_workers="block", reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(600_000)
    with served(folder) as url:
        page.goto(url)
        page.locator("#again:enabled").wait_for()
        page.fill("#share", str(stop))
        page.locator("#again:disabled").wait_for()
        page.locator("#again:enabled").wait_for()
        found: list[dict[str, Any]] = []
        for i in range(rounds):
            if i:
                page.click("#again")
                page.locator("#again:disabled").wait_for()
                page.locator("#again:enabled").wait_for()
            with page.expect_download() as download:
                page.click("#save")
            found.append(json.loads(Path(download.value.path()).read_text()))
    context.close()
    for later in found[1:]:
        found[0]["unreduced"]["milliseconds"] += later["unreduced"]["milliseconds"]
        for row, other in zip(found[0]["rows"], later["rows"], strict=True):
            row["milliseconds"] += other["milliseconds"]
    return found[0]


def models(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The unreduced model first."""
    return [{"method": "identity", "share": 1.0, **said["unreduced"]}, *said["rows"]]


def cosine(a: list[float], b: list[float]) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of five rounds each")
    parser.add_argument("--keep", type=Path, help="folder for the two pages; none: they are thrown away")
    parser.add_argument("--json", type=Path, default=RESULTS / "browser.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = args.keep or Path(scratch)
        manifests = build(folder, graphs.PRECISIONS, (args.share,))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        said = {p: measure(browser, folder / p, 1, args.rounds) for p in graphs.PRECISIONS}
        sheet = Sheet(args.json, share=args.share, chromium=browser.version, threads=said["fp32"]["threads"])
        browser.close()
    for precision, found in said.items():
        for row, exact in zip(models(found), models(said["fp32"]), strict=True):
            ms, whole = row["milliseconds"], found["unreduced"]["milliseconds"]
            cells = {
                "precision": precision, "method": row["method"], "share": row["share"],
                "ms": float(np.median(ms)), "ms_best": min(ms),
                "speedup": float(np.median(np.divide(whole, ms))), "speedup_best": min(whole) / min(ms), "rounds": len(ms),
                "cosine": row["cosine"], "rounding": cosine(row["features"], exact["features"]),
                "megabytes": manifests[precision]["weights"]["bytes"] / 1e6,
            }  # fmt: skip
            text = "{precision} {method}: {ms:.0f} ms ({ms_best:.0f}), {speedup:.2f}x ({speedup_best:.2f}x), cosine {cosine:.3f}"
            sheet.add(cells, text.format(**cells))
    sheet.save()


if __name__ == "__main__":
    main()
