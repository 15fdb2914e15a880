"""A recipe of the smallest kind, for tests of the engine. Also run as a program, to be killed half-way."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from torchgraft.experiments import Claim, Measurement

DATA = ()
CLAIMS = (Claim("b beats a", "score", "b/high", "a", 1.0, unit="points", paper="1 -> 9"),)


@dataclass(frozen=True)
class Config:
    seeds: int = 3
    pause: float = 0.0
    grid: tuple[float, ...] = (0.1, 0.2)
    name: str = "toy"
    loud: bool = False
    log: str = ""
    device: str = "cpu"


SCALES = {"smoke": Config(seeds=1), "laptop": Config(), "long": Config()}


def arms(config):
    def note(arm, seed):
        if config.log:
            with Path(config.log).open("a") as handle:
                handle.write(f"{arm} {seed}\n")

    def a(seed, progress):
        note("a", seed)
        lr = progress.once("lr-a", lambda: {"chosen": 0.1})
        time.sleep(config.pause)
        progress(1, 1, "done")
        return Measurement({"score": seed + lr["chosen"]}, curves={"score": ([0, 1], [0, seed])})

    def b(seed, progress):
        note("b", seed)
        (progress.folder / "checkpoint.txt").write_text("x")
        time.sleep(config.pause)
        return {"b/low": Measurement({"score": seed}), "b/high": Measurement({"score": seed + 5 + 0.1 * seed})}

    return {"a": a, "b": b}


def figures(result):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot(result.values("a", "score"))
    return {"toy": figure}


def notes(result):
    return f"{len(result.seeds)} seeds"


if __name__ == "__main__":
    from torchgraft.experiments.engine import Run

    config = Config(pause=0.4, log=sys.argv[2])
    Run.prepare("toy", "laptop", config, Path(sys.argv[1]), module=sys.modules["__main__"]).execute()
