"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from torchgraft import __version__, catalog

if TYPE_CHECKING:
    from torchgraft.experiments.engine import Run, Watcher

app = typer.Typer(
    name="torchgraft",
    help="Published techniques as grafts onto your own PyTorch model, each measured against an honest baseline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def _stop(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"torchgraft: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the errors that a user can mend into one line and exit code 2; a missing extra into how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("torchgraft"):
            raise
        _stop(f"{error}; the package {error.name!r} comes with an extra: pip install 'torchgraft[all]'", 3)
    except (ValueError, LookupError, FileNotFoundError) as error:
        _stop(str(error.args[0] if isinstance(error, KeyError) else error))


def _card(slug: str) -> catalog.Card:
    with _explained():
        return catalog.get(slug)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = None,
) -> None:
    pass


@app.command("list")
def list_(
    room: Annotated[str | None, typer.Option(help="Only this room, for instance vision.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only cards with this tag.")] = None,
    as_json: Json = False,
) -> None:
    """What exists: one line per technique."""
    with _explained():
        cards = list(catalog.cards().values())
    rooms, tags = {c.room for c in cards}, {t for c in cards for t in c.tags}
    if room is not None and room not in rooms:
        _stop(f"no room {room!r}; the rooms with techniques are: {', '.join(sorted(rooms))}")
    if tag is not None and tag not in tags:
        _stop(f"no tag {tag!r}; the tags are: {', '.join(sorted(tags))}")
    chosen = [c for c in cards if room in (None, c.room) and (tag is None or tag in c.tags)]
    if as_json:
        typer.echo(json.dumps([c.summary_record() for c in chosen], indent=1, ensure_ascii=False))
        return
    width = max((len(c.slug) for c in chosen), default=0)
    for card in chosen:
        typer.echo(f"{card.slug:<{width}}  {card.room:<10} {card.summary}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help='What you need, for instance "robust to small shifts".')],
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    words: Annotated[bool, typer.Option("--words", help="By words, even where meaning is available.")] = False,
    as_json: Json = False,
) -> None:
    """Techniques for a need, best first; by meaning where the model is on this machine, else by words."""
    embed = None if words else _embedder()
    with _explained():
        hits = catalog.search(query, room=room, embed=embed)
    by = "meaning" if embed is not None else "words"
    if as_json:
        found = [{"slug": h.card.slug, "score": round(h.score, 4), "summary": h.card.summary} for h in hits]
        typer.echo(json.dumps({"by": by, "hits": found}, indent=1, ensure_ascii=False))
        return
    if not hits:
        _stop(f"nothing found for {query!r} by {by}; `torchgraft list` shows everything", 1)
    for hit in hits:
        typer.echo(f"{hit.card.slug:<24} {hit.score:6.3f}  {hit.card.summary}")
    typer.echo(f"(searched by {by})")


def _embedder() -> Any:
    """all-MiniLM-L6-v2 where transformers and the model are on this machine already; never downloads."""
    import importlib
    import importlib.util

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torchgraft.zoo") is None:
        return None
    zoo = importlib.import_module("torchgraft.zoo")

    if zoo.available().get("minilm") is None:
        return None
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    model, tokenizer = zoo.load("minilm")
    return lambda texts: zoo.embed(model, tokenizer, texts).tolist()


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="A technique, as `torchgraft list` names it.")], as_json: Json = False
) -> None:
    """The card of a technique, with what was measured."""
    card = _card(slug)
    if as_json:
        typer.echo(json.dumps({**card.summary_record(), "text": card.body}, indent=1, ensure_ascii=False))
        return
    heading = f"# {card.title}\n\n{', '.join(card.authors)} · {card.venue} {card.year} · arXiv {card.arxiv}\n"
    text = f"{heading}\nOfficial code: {card.official_code}\n\n{card.body}"
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        typer.echo(text)


class _Bar:
    """The engine's progress as a bar with time left, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console, speed_estimate_period=600)
        self.task: Any = None
        self.done = 0

    def plan(self, parts: Sequence[str]) -> None:
        self.task = self.progress.add_task("starting", total=len(parts))
        self.progress.start()

    def report(self, part: str, done: float, total: float, note: str) -> None:
        share = min(done / total, 1.0) if total else 0.0
        self.progress.update(self.task, completed=self.done + share, description=f"{part} {note}".strip())

    def finished(self, part: str, seconds: float) -> None:
        self.done += 1
        self.progress.update(self.task, completed=self.done)
        self.progress.console.print(f"{part}: {seconds:.1f} s, kept", highlight=False)


@app.command()
def run(
    slug: Annotated[str, typer.Argument(help="A technique, as `torchgraft list` names it.")],
    scale: Annotated[str, typer.Option(help="smoke, laptop, gpu, paper, or what else the recipe has.")] = "laptop",
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="name=value, any field of the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="The data set to measure on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    record: Annotated[bool, typer.Option("--record", help="Copy the result into evidence/ and the card.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what this folder already holds.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a technique against its baseline. A run that was stopped goes on where it stopped."""
    card = _card(slug)
    changes = [f"{name}={value}" for name, value in (("seeds", seeds), ("data", data), ("device", device)) if value]
    changes += settings or []
    with _explained():
        from torchgraft.experiments.engine import Run, configure, recipe, store_evidence

        module = recipe(card.recipe)
        config = configure(module, scale, changes)
        command = ["torchgraft", "run", card.slug, "--scale", scale]
        command += [word for change in changes for word in ("--set", change)]
        this = Run.prepare(card.recipe, scale, config, out, shlex.join(command), module)
    if fresh and this.folder.exists():
        this.folder.rename(_aside(this.folder))
    if this.finished:
        typer.echo(f"This run is finished already, in {this.folder}; --fresh measures it again.", err=True)
    else:
        _execute(this)
    stored = json.loads((this.folder / "result.json").read_text(encoding="utf-8"))
    with _explained():
        from torchgraft.experiments.report import render

        (this.folder / "report.html").write_text(render(this.folder, card.title), encoding="utf-8")
    kept: list[Path] = []
    if record:
        with _explained():
            folder = catalog.evidence_folder()
            if folder is None:
                raise ValueError("--record needs a checkout of the repository; this is an installed package")
            kept = store_evidence(this, folder)
            catalog.fill(card.slug)
    if as_json:
        typer.echo(json.dumps(stored, indent=1))
        return
    _table(stored)
    typer.echo(f"Report: {this.folder / 'report.html'}")
    for path in kept:
        typer.echo(f"Recorded: {path}")


def _aside(folder: Path) -> Path:
    """A free name beside a run that is to be measured again; nothing measured is thrown away."""
    number = 1
    while (place := folder.with_name(f"{folder.name}.before{number}")).exists():
        number += 1
    return place


def _execute(this: Run) -> None:
    bar: Watcher
    with _explained():
        bar = _Bar()
        try:
            this.execute(bar)
        except KeyboardInterrupt:
            _stop(f"stopped; what is measured is kept in {this.folder}, and the same command goes on from there", 130)
        finally:
            bar.progress.stop()


def _table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from torchgraft.catalog.measured import interval, show, tables

    # a pipe has no width of its own, and a cut table helps nobody
    console = Console(width=None if sys.stdout.isatty() else 140)
    for metrics, rows in tables(record):
        table = Table("arm", *metrics, title=f"{record['slug']}, {record['scale']}: mean ± s.d. over seeds")
        for arm, cells in rows:
            table.add_row(Text(arm), *cells)
        console.print(table)
    claims = Table("claim", "effect", "95 % interval", "verdict", "the paper")
    for claim in record["claims"]:
        claims.add_row(
            Text(claim["text"]),
            f"{show(claim['estimate'])} {claim['unit']}",
            interval(claim["interval"]),
            claim["verdict"],
            Text(claim["paper"]),
        )
    if record["claims"]:
        console.print(claims)
    console.print(Text(record["notes"]))


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="One or several benches; without one, all are listed.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two or three tiny cases.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    record: Annotated[bool, typer.Option("--record", help="Write evidence/bench/<name>.json and figures.")] = False,
    as_json: Json = False,
) -> None:
    """Ours against a named peer, in one process, in turn; the ratio with its spread."""
    import os
    import pkgutil

    # torch's profiler, which counts the memory, would otherwise log every start and stop; it reads this when loaded
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torchgraft.bench as benches

    known = [module.name for module in pkgutil.iter_modules(benches.__path__)]
    if not names:
        typer.echo("\n".join(known))
        return
    for name in names:
        if name not in known:
            _stop(f"no bench {name!r}{_nearest(name, known)}; there are: {', '.join(known)}")
    if record and quick:
        _stop("--quick cases are for tests and are not recorded; leave one of the two out")
    found = {}
    for name in dict.fromkeys(names):
        with _explained():
            found[name] = _measured(name, quick=quick, device=device, record=record)
        if not as_json:
            if len(names) > 1:
                typer.echo(f"{name}:")
            for case in found[name]["cases"]:
                size = ", ".join(f"{key} {value}" for key, value in case["size"].items())
                low, high = case["ratio_spread"]
                typer.echo(
                    f"{size} | ours {case['ours_s']:.4g} s, {case['peer']} {case['peer_s']:.4g} s, "
                    f"ratio {case['ratio']:.3g} ({low:.3g} to {high:.3g})"
                )
    if as_json:
        typer.echo(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))


def _measured(name: str, *, quick: bool, device: str, record: bool) -> dict[str, Any]:
    from torchgraft.experiments.benching import measure, store

    stored = measure(name, quick=quick, device=device, say=lambda line: typer.echo(line, err=True))
    if record:
        folder = catalog.evidence_folder()
        if folder is None:
            raise ValueError("--record needs a checkout of the repository; this is an installed package")
        for path in store(stored, folder / "bench"):
            typer.echo(f"Recorded: {path}", err=True)
        for card in catalog.cards().values():
            if name in card.bench:
                catalog.fill(card.slug)
    return stored


def _nearest(name: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean {near[0]!r}?" if near else ""


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run, below runs/.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="The page to write; report.html in the folder if not given.")
    ] = None,
) -> None:
    """One self-contained HTML page of a finished run."""
    with _explained():
        from torchgraft.experiments.report import render

        page = render(folder)
        target = to if to is not None else folder / "report.html"
        target.write_text(page, encoding="utf-8")
    typer.echo(str(target))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed, which data and models are found, what is missing and how to get it."""
    with _explained():
        from torchgraft.experiments.health import examine

        found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for heading, rows in found.items():
        typer.echo(f"{heading}:")
        for name, value in rows.items():
            typer.echo(f"  {name:<24} {value}")


def main() -> None:
    """Entry point of the console script."""
    app()
