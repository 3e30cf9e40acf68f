"""Training that loses a machine: two torchrun agents, one of them killed, the other goes on from the last checkpoint.

    python benchmarks/elastic.py        # benchmarks/results/elastic.json

A tiny ViT with eTPS on 200 pictures of two kinds, on CPUs. Each agent stands for a machine and has one process; after the first
epoch one agent and its process get SIGKILL. The run that is left is compared with one that was never disturbed, in one process.
"""

import csv
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from squeezevit.errors import CheckpointError
from squeezevit.train import checkpoints
from workshop import RESULTS, Sheet, arguments

EPOCH = 25  # updates
TINY = (
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.options={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}",
    "data.workers=0",
    "device=cpu",
    "optimizer.lr=1e-3",
    "reducer.keep=0.5",
    "reducer.at=1,2",
    "batch_size=8",
    "epochs=3",
    "tensorboard=false",
    "save_every=5",
    "augment.color_jitter=0",
    "augment.hflip=0",
    "augment.crop_scale=1,1",
    "augment.smoothing=0",
)


def pictures(root: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 100), ("val", 25)):
        for name, brightness in (("dark", 115), ("light", 135)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = random.normal(brightness, 40, (36, 36, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{i}.png")
    return root


def command(data: Path, out: Path) -> list[str]:
    return [
        "-m",
        "squeezevit",
        "train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--resume",
        *(o for s in TINY for o in ("--set", s)),
    ]


def agent(port: int, nodes: str, line: list[str]) -> subprocess.Popen:
    """A machine: a torchrun of one process."""
    launch = ["-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launch += [
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=1",
        "--local-addr=localhost",
        "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *launch, *line]
    return subprocess.Popen(
        whole, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def updates(out: Path) -> int:
    """Those that the last checkpoint holds."""
    try:
        state = checkpoints.load_state(out / "last/state.pt")
    except CheckpointError:  # not there yet, or just being replaced
        return 0
    return int(state["epoch"]) * EPOCH + int(state["update"])


def rows(out: Path) -> list[dict[str, str]]:
    file = out / "log.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []


def world(agent: subprocess.Popen) -> int:
    """How many processes the run has, by what torchrun told the worker of this machine."""
    found = [p.environ().get("WORLD_SIZE") for p in psutil.Process(agent.pid).children()]
    return max((int(size) for size in found if size), default=0)


def kill(agent: subprocess.Popen) -> None:
    """The machine with all that runs on it: its worker has a session of its own."""
    family = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    for process in family:
        process.kill()


def lose(data: Path, out: Path, killed: str) -> dict[str, Any]:
    """Two machines, of which one is killed: the one that holds the rendezvous, or the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    host = agent(port, "1:2", command(data, out))
    time.sleep(5)  # the first one opens the rendezvous
    other = agent(port, "1:2", command(data, out))
    victim, left = (host, other) if killed == "host" else (other, host)
    try:
        while not rows(out) and left.poll() is None:
            time.sleep(0.2)
        while updates(out) % EPOCH < 10 and left.poll() is None:
            time.sleep(0.1)
        processes = world(victim)
        kill(victim)
        at, kept = time.monotonic(), updates(out)
        while updates(out) <= kept and left.poll() is None:
            time.sleep(0.2)
        back = time.monotonic() - at
        said, _ = left.communicate(timeout=300)
    finally:
        for process in (host, other):
            if process.poll() is None:
                kill(process)
    found = rows(out)
    told = {
        "killed": killed,
        "processes": processes,
        "exit": left.returncode,
        "updates_kept": kept,
        "seconds_to_next_checkpoint": back,
        "epochs": len(found),
    }
    return {
        **told,
        "last_line": said.strip().splitlines()[-1].replace(f"{out.parent}/", "")[:200],
        "losses": [float(row["loss"]) for row in found],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "elastic.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(Path(folder) / "data")
        whole = Path(folder) / "whole"
        subprocess.run(
            [sys.executable, *command(data, whole)], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        losses = [float(row["loss"]) for row in rows(whole)]
        sheet = Sheet(args.json, updates=3 * EPOCH, save_every=5)
        sheet.add({"killed": "nobody", "exit": 0, "epochs": len(losses), "losses": losses}, f"undisturbed: {losses}")
        for killed in ("other", "host"):
            row = lose(data, Path(folder) / killed, killed)
            if row["exit"] == 0:
                row["largest_difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], losses, strict=True))
            sheet.add(row, str(row))
            sheet.save()


if __name__ == "__main__":
    main()
