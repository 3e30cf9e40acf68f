"""Command lines and calls that nobody would write, drawn by a fixed seed: none may end in an error that is not the library's.

python benchmarks/fuzz.py        # 1,000 command lines and 5,000 calls: benchmarks/results/fuzz.json

A command line runs in a process of its own and may end with 0 or 2; one that works longer is interrupted, and ends with 130. A call
may return, or raise one of the library's errors, whose message fits on a screen; after an error the model must answer as before.
"""

import json
import math
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

import squeezevit as sv
from squeezevit.checkpoint import save_checkpoint
from squeezevit.cli import app, screen
from squeezevit.errors import SqueezeViTError
from squeezevit.reducers.catalog import methods
from workshop import RESULTS, Sheet, arguments, say

LONGEST, ENDING = 10, 30  # seconds until a command line is interrupted, and for it to end then
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
NUMBERS = ("0", "1", "-1", "0.5", "0.7", "nan", "inf", "1e400", "9" * 30, "50%", "1e-320", "", " ", "0x10", "½", "1,2", "٣")
TEXTS = (
    "",
    "-",
    "--",
    "'",
    "[bold]x[/bold]",
    "\x1b[2J",
    "a" * 5000,
    "../../etc",
    "nul\udce9",
    "💥",
    "{}",
    "~",
    "*",
    "$HOME",
    "a\nb",
)


def make_files(folder: Path) -> list[str]:
    """Files and folders of every kind; their paths."""
    rng = np.random.default_rng(0)
    for name in ("train/0", "train/1", "val/0", "val/1", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("train/0/a.jpg", "train/1/b.png", "val/0/c.jpg", "val/1/d.png", "photo.jpg", "[p] h.png"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("L", (4000, 2)).save(folder / "thin.png")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:300])
    (folder / "text.jpg").write_text("no picture")
    (folder / "nothing.yaml").touch()
    (folder / "latin.yaml").write_bytes("out: caf\xe9".encode("latin-1"))
    (folder / "deep.yaml").write_text("[" * 4000)
    (folder / "recipe.yaml").write_text("epochs: 1\nmodel: {name: vit_tiny_patch16_224}\n")
    (folder / "classes.txt").write_text("1\n0\n")
    (folder / "noise.safetensors").write_bytes(rng.bytes(500))
    torch.save({"x": 1}, folder / "odd.pth")
    save_checkpoint(timm.create_model("vit_tiny_patch16_224", **TINY), folder / "tiny.safetensors")
    (folder / "locked").mkdir(mode=0o500)
    return [str(path) for path in sorted(folder.rglob("*"))] + [str(folder), str(folder / "absent"), "/dev/null", "/dev/full"]


def draw_line(rng: random.Random, commands: dict[str, Any], paths: list[str]) -> list[str]:
    """A command line: options of a command or of another, values that fit or do not, twice or not at all."""
    name = rng.choice([*commands, "", "tps", "--version", "-h"])
    command = commands.get(name) or rng.choice([*commands.values()])
    flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")]
    line = rng.choice(([], [], [], ["--import", rng.choice(("new_method", "json", "os.path", "", "no-such"))])) + [name] * (
        name != ""
    )
    if name in ("show", "demo") or rng.random() < 0.1:
        line += rng.choices(paths, k=rng.randint(0, 2))
    if rng.random() < 0.7:  # what makes a line run for seconds at most
        line += {
            "bench": ["--model", "vit_tiny_patch16_224", "--rounds", "1", "--batch-size", "1", "--methods", "etps"],
            "plan": ["--model", "vit_tiny_patch16_224", "--macs", "0.5"],
            "eval": ["--model", "vit_tiny_patch16_224", "--data", paths[-4], "--num-classes", "2", "--workers", "0"],
            "train": ["--print-config"],
            "demo": ["--methods", "none"],
        }.get(name, [])
    elif name in ("train", "demo"):
        line += ["--print-config"] if name == "train" else ["--methods", rng.choice(TEXTS)]
    for _ in range(rng.randint(0, 4)):
        value = rng.choice(
            rng.choice((NUMBERS, TEXTS, paths, [*methods()], ("cpu", "cuda:99", "meta", "bf16", "auto", "vit_tiny_patch16_224")))
        )
        line += [rng.choice(flags or ["--x"])] + [value] * (rng.random() < 0.85)
    if name == "plan" and "--latency" in line:
        line += ["--batch-size", "1"]
    return line


def run_line(line: list[str], folder: Path) -> tuple[str, str]:
    """How a command line ended, and what it said last."""
    said = folder.parent / "said"
    child = os.fork()
    if child == 0:
        _be(line, folder, said)
    for seconds, sent in ((LONGEST, signal.SIGINT), (ENDING, signal.SIGKILL)):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return str(os.waitstatus_to_exitcode(status)), said.read_text(errors="replace")[-1500:]
            time.sleep(0.01)
        os.kill(child, sent)
    os.waitpid(child, 0)
    return "did not end when interrupted", said.read_text(errors="replace")[-1500:]


def _be(line: list[str], folder: Path, said: Path) -> None:
    """What the child does: the command line, its output in a file, and nothing after it."""
    code = 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        os.chdir(folder / "locked")
        with said.open("w") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        try:
            app.main(line)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            screen.errors.print_exception()
    finally:
        screen.console.file.flush()
        screen.errors.file.flush()
        os._exit(code & 0xFF)


def models() -> list[nn.Module]:
    """Small models of every library, and two that cannot be reduced."""
    hugging = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    made: list[nn.Module] = [
        timm.create_model("vit_tiny_patch16_224", **TINY),
        timm.create_model("vit_tiny_patch16_224", **TINY, class_token=False, global_pool="avg"),
        transformers.Dinov2Model(transformers.Dinov2Config(**hugging)),
        transformers.ViTForImageClassification(transformers.ViTConfig(**hugging, intermediate_size=96)),
        torchvision.models.VisionTransformer(32, 8, 4, 3, 48, 96, num_classes=5),
        nn.Linear(3, 3),
        timm.create_model("resnet18", num_classes=5),
    ]
    return [model.eval() for model in made]


class Calls:
    """Calls of the public interface with values that fit or do not."""

    def __init__(self, seed: int, paths: list[str]) -> None:
        self.rng, self.paths, self.models = random.Random(seed), paths, models()
        self.kinds = [sv.ETPS, sv.DTPS, sv.EViT, sv.TopK, sv.Random, sv.DynamicViT, sv.Squeeze, sv.ToMe, sv.Identity]
        self.images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def value(self) -> Any:
        """Anything."""
        pick = self.rng.choice
        plain = (
            0,
            1,
            -1,
            2,
            10**30,
            0.5,
            0.7,
            1.0,
            math.nan,
            math.inf,
            -0.0,
            True,
            None,
            "",
            "0.5",
            "auto",
            b"x",
            1j,
            object(),
            int,
        )
        nested = (
            (),
            [],
            {},
            (1, 2),
            [0.5],
            (0.5, 0.5),
            (1, 1),
            ("a",),
            (None,),
            {"keep": 0.5},
            range(3),
            {1},
            [[1]],
            (1.5,),
            (3, 99),
        )
        tensors = (
            torch.tensor(1),
            torch.zeros(0),
            torch.ones(2, 16),
            torch.full((1,), math.nan),
            np.ones(3),
            np.float32(0.5),
            np.int64(2),
        )
        return pick(pick((plain, nested, tensors, self.paths, NUMBERS, TEXTS, self.models)))

    def reducer(self) -> Any:
        """Mostly one that can be meant."""
        pick = self.rng.choice
        if self.rng.random() < 0.15:
            return self.value()
        kind = pick(self.kinds)
        if self.rng.random() < 0.6:
            return (
                kind()
                if kind is sv.Identity
                else kind(r=pick((1, 2, 3)))
                if kind is sv.ToMe
                else kind(keep=pick((0.3, 0.5, 1)), at=(1, 2))
            )
        names = pick((("keep",), ("at",), ("keep", "at"), ("r",), ("mass",), ("score",), ("keep", "nonsense"), ("match", "keep")))
        values = {name: self.value() for name in names}
        if callable(values.get("score")):  # a function of the user's, whose errors are the user's
            del values["score"]
        return kind(**values)

    def draw(self) -> tuple[str, Callable[[], Any], nn.Module]:
        """What is called, the call, and the model it is about."""
        rng, model = self.rng, self.rng.choice(self.models)
        target: Any = model if rng.random() < 0.9 else self.value()
        calls: dict[str, Callable[[], Any]] = {
            "reduce_": lambda: sv.reduce_(target, self.reducer(), **rng.choice(({}, {}, {"grid": rng.choice((True, False))}))),
            "reducer": self.reducer,
            "restore_": lambda: sv.restore_(target),
            "macs": lambda: sv.macs(target, rng.choice((None, 32, self.value()))),
            "plan": lambda: sv.plan(target, self.reducer(), macs=rng.choice((0.5, 0.7, self.value()))),
            "preset": lambda: sv.preset(target, macs=rng.choice((0.5, 0.6, self.value()))),
            "trace": lambda: self._traced(target),
            "pool": lambda: sv.pool(self.value(), self.value()),
            "load_checkpoint_": lambda: sv.load_checkpoint_(target, rng.choice((self.value(), self._weights(model)))),
            "from_pretrained": lambda: sv.from_pretrained(transformers.AutoModel, rng.choice(self.paths), local_files_only=True),
            "families": sv.families,
        }
        name = rng.choice([*calls, "reduce_", "reduce_", "trace"])
        return name, calls[name], model

    def _traced(self, target: Any) -> Any:
        with sv.trace(target) as t:
            target(self.images)
        return [t.groups, t.sizes, t.stages, sv.pool(torch.randn(2, t.sizes.shape[1], 4), t)]

    def _weights(self, model: nn.Module) -> dict[str, Any]:
        weights = dict(model.state_dict())
        key = self.rng.choice([*weights])
        weights[key] = self.value()
        return weights


def answer(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model(images)
    return next(iter(out.values())) if isinstance(out, dict) else out


def _ordinary(error: BaseException, name: str) -> bool:
    """Python's own word on a call with names or numbers of arguments that a function has not; Hugging Face's of its folders."""
    text = str(error)
    return (isinstance(error, TypeError) and "argument" in text and "()" in text) or (
        name == "from_pretrained" and isinstance(error, OSError | ValueError)
    )


def fuzz_calls(count: int, seed: int, paths: list[str]) -> tuple[Counter[str], list[dict[str, str]]]:
    """How calls ended, and those that ended as none may."""
    calls, ended, wrong = Calls(seed, paths), Counter[str](), list[dict[str, str]]()
    working = {id(m): m for m in calls.models[:5]}
    before = {key: answer(m, calls.images) for key, m in working.items()}
    for number in range(count):
        name, call, model = calls.draw()
        try:
            call()
            ended["returned"] += 1
        except SqueezeViTError as error:
            ended[type(error).__name__] += 1
            if len(str(error)) > 1500:
                wrong.append({"call": f"{number} {name}", "ended": f"{len(str(error))} characters"})
            if id(model) in working and not torch.allclose(answer(model, calls.images), before[id(model)], 0, 0, equal_nan=True):
                wrong.append({"call": f"{number} {name}", "ended": f"after {error} the model answers differently"})
        except Exception as error:
            if _ordinary(error, name):
                ended["python's own"] += 1
            else:
                wrong.append({"call": f"{number} {name}", "ended": f"{type(error).__name__}: {error}"[:500]})
        for key, m in working.items() if name in ("reduce_", "restore_", "load_checkpoint_") else ():
            before[key] = answer(m, calls.images)
    return ended, wrong


def fuzz_lines(count: int, seed: int, folder: Path, paths: list[str]) -> tuple[Counter[str], list[dict[str, str]]]:
    """How command lines ended, and those that ended as none may."""
    rng, commands = random.Random(seed), app.typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    ended, wrong = Counter[str](), list[dict[str, str]]()
    for number in range(count):
        line = draw_line(rng, commands, paths)
        code, said = run_line(line, folder)
        ended[code] += 1
        if code not in ("0", "2", "130") or "Traceback" in said:
            wrong.append({"line": json.dumps(line)[:600], "ended": code, "said": said})
            say(f"{number}: {code} {json.dumps(line)[:300]}\n{said[-600:]}")
        elif number % 100 == 99:
            say(f"{number + 1} command lines: {dict(ended)}")
    return ended, wrong


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "fuzz.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # what several have been used in cannot be forked
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "files")
        folder.mkdir()
        paths = make_files(folder)
        os.environ["XDG_CACHE_HOME"] = name
        lines, wrong_lines = fuzz_lines(chosen.lines, chosen.seed, folder, paths)
        calls, wrong_calls = fuzz_calls(chosen.calls, chosen.seed, paths)
    sheet = Sheet(chosen.json, seed=chosen.seed)
    sheet.add(
        {"what": "command lines", "asked": chosen.lines, "ended": lines, "wrong": wrong_lines}, f"command lines: {dict(lines)}"
    )
    sheet.add({"what": "calls", "asked": chosen.calls, "ended": calls, "wrong": wrong_calls}, f"calls: {dict(calls)}")
    for row in wrong_calls:
        say(f"{row['call']}: {row['ended']}")
    say(f"wrong: {len(wrong_lines)} command lines, {len(wrong_calls)} calls")
    sheet.save()


if __name__ == "__main__":
    main()
