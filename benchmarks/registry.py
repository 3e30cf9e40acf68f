"""What can be reduced of all that timm and transformers can build: every name and class is tried, without weights.

python benchmarks/registry.py               # benchmarks/results/registry.json

Models are built on the meta device, transformers' with at most four layers where their configuration allows it. Each is reduced by
eTPS, with the full grid where it must be, and the part that takes images runs, so that none is called supported that then fails.
"""

import importlib
import inspect
import logging
import pkgutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

import squeezevit as sv
from squeezevit.core.attach import reduce_as_needed_
from squeezevit.errors import SqueezeViTError, UnsupportedError
from workshop import RESULTS, Sheet, arguments, earlier, say

SECONDS, LAYERS = 120, 4  # for one model, and those left in transformers' models
WORDS = ("Attention", "Attn")  # a class whose name has one of these is what makes a transformer


class Late(BaseException):
    """A model takes too long; no library catches it for an error of its own."""


def of_timm() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name)  # type: ignore[misc]


def of_transformers() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """All classes that take images, videos or spectrograms, each once."""
    seen = set()
    for path in _modeling():
        try:
            module = importlib.import_module(path)
        except ImportError:
            continue
        for name, found in inspect.getmembers(module, inspect.isclass):
            own = found.__module__ == module.__name__ and issubclass(found, transformers.PreTrainedModel)
            if own and name not in seen and hasattr(transformers, name) and _takes_images(found):
                seen.add(name)
                yield name, lambda found=found: _small(found)  # type: ignore[misc]


def _modeling() -> Iterator[str]:
    """Modules of transformers that have models."""
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        try:
            inside = importlib.import_module(package.name)
        except ImportError:
            continue
        for module in pkgutil.iter_modules(getattr(inside, "__path__", []), f"{package.name}."):
            if module.name.rpartition(".")[2].startswith("modeling_"):
                yield module.name


def _takes_images(model_class: type) -> bool:
    forward = vars(model_class).get("forward")
    names = () if forward is None else inspect.signature(forward).parameters
    return any(name.startswith(("pixel_values", "input_values", "input_features")) for name in names)


def _small(model_class: Any) -> nn.Module:
    try:
        return model_class(_fewer_layers(model_class.config_class()))
    except Exception:  # a configuration that does not go with fewer layers, in its own words
        return model_class(model_class.config_class())


def _fewer_layers(config: Any) -> Any:
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            _fewer_layers(getattr(config, name))
    for name in ("num_hidden_layers", "depth", "n_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), LAYERS))
    return config


def verdict(build: Callable[[], nn.Module]) -> tuple[str, str]:
    """ "supported", "needs the grid", "refused", "accepted, then fails", "no transformer" or "cannot be built", and why."""
    try:
        with torch.device("meta"):
            model = build().eval()
    except Exception as error:
        return "cannot be built", _short(error)
    if not any(word in type(module).__name__ for module in model.modules() for word in WORDS):
        return "no transformer", ""
    try:
        grid = reduce_as_needed_(model, sv.ETPS(keep=0.5)).squeezevit_state.grid
    except UnsupportedError as error:
        return "refused", _short(error)
    try:
        dense = sv.macs(sv.restore_(model))
    except Exception as error:
        return "supported, not run", _short(error)  # nor does it run unreduced without values
    try:
        assert sv.macs(reduce_as_needed_(model, sv.ETPS(keep=0.5))) < dense
    except UnsupportedError as error:  # what the proof would find, which needs weights
        return "refused", _short(error)
    except Exception as error:
        return "accepted, then fails", _short(error)
    return ("needs the grid" if grid else "supported"), ""


def _short(error: BaseException) -> str:
    return f"{'' if isinstance(error, SqueezeViTError) else type(error).__name__ + ': '}{error}"[:300]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--libraries", nargs="+", default=["timm", "transformers"], help="those to try; rows of others stay in the file"
    )
    parser.add_argument("--only", default="", help="names that contain this; rows of others stay in the file")
    parser.add_argument("--json", type=Path, default=RESULTS / "registry.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("squeezevit").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sheet = Sheet(args.json, seconds=SECONDS, layers=LAYERS)
    before = earlier(args.json).get("rows", [])
    sheet.rows = [row for row in before if row["library"] not in args.libraries or args.only not in row["name"]]

    def late(*_: object) -> None:
        raise Late(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for library in args.libraries:
        names = {"timm": of_timm, "transformers": of_transformers}[library]()
        counts: Counter[str] = Counter()
        for name, build in names:
            if args.only not in name:
                continue
            signal.alarm(SECONDS)
            try:
                found, why = verdict(build)
            except Late as error:
                found, why = "not run", str(error)
            finally:
                signal.alarm(0)
            counts[found] += 1
            if found != "no transformer":
                sheet.add({"library": library, "name": name, "verdict": found, "reason": why}, f"{name}: {found} {why[:150]}")
        say(f"{library}: {dict(counts)}")
        sheet.save()


if __name__ == "__main__":
    main()
