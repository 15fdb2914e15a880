"""Score candidate answers, and measure how much an ordinary prompt depends on the order.

B prompts, n candidates, K orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchgraft.language.set_based_prompting.encoding import (
    BRANCH,
    PLAIN,
    SET_BASED,
    Editing,
    Part,
    check_list,
    collate,
    elements_of,
    front_tokens,
    lay_out,
    padding_token,
    run,
    tokenize,
    tokenize_texts,
    with_mask,
)
from torchgraft.language.set_based_prompting.generation import check_suffix, generate
from torchgraft.language.set_based_prompting.prompts import Order, SetPrompt, listing_orders
from torchgraft.language.set_based_prompting.support import check_model

Options = Sequence[str] | Sequence[Sequence[str]]


def score_options(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    options: Options,
    reduction: Literal["mean_logit", "logprob", "pmi"] = "mean_logit",
    *,
    editing: Editing = SET_BASED,
    neutral: str | None = None,
    steps: int | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "B n"]:
    """Score every candidate as the continuation of every prompt; the greatest score is the prediction.

    - ``"logprob"``: log-probability of the candidate's tokens, summed, given the prompt. All candidates are computed
      in one pass over ``[prompt, candidate 1, …, candidate n]``, in which the candidates do not see each other and all
      start at the position after the prompt: the paper's own mask, used on the answer side. A softmax of these
      scores compares candidates.
    - ``"pmi"``: ``"logprob"`` minus the log-probability of the candidate after ``neutral`` alone, which takes out
      how likely the words are by themselves.
    - ``"mean_logit"``: the official scoring. Continue greedily for as many steps as the longest candidate has tokens;
      read the raw logit of the candidate's token t at step t, whatever was generated before; mean over its tokens, but
      for steps after the end of the text.

    Candidates are tokenised as they are, without special tokens. (The official code tokenises them with special tokens,
    so that for Llama-like tokenizers the first token of a candidate is read at the second step; here it is the first.)

    Args:
        model: a transformers decoder in eval mode, see `check_model`.
        tokenizer: its tokenizer.
        prompts: each must end with text.
        options: candidates, the same for every prompt or one list per prompt.
        reduction: see above.
        editing: Set-Based Prompting, or an ablation. Candidates are kept apart in any case.
        neutral: text before the candidate for ``"pmi"``; the prompt's last text where not given.
        steps: for ``"mean_logit"``, read this many steps only (official: 10).
        batch_size: prompts per pass.

    Returns:
        Float32 scores [B, n] on the CPU; ``-inf`` where a prompt has fewer candidates than another.

    Raises:
        TypeError: ``prompts`` is no list of `SetPrompt`.
        ValueError: unknown reduction, empty or missing candidates, a prompt that ends with a set, ``neutral`` or
            ``steps`` with a reduction that does not use it, or a model that cannot do this.
    """
    if reduction not in ("mean_logit", "logprob", "pmi"):
        raise ValueError(f"reduction must be 'mean_logit', 'logprob' or 'pmi', got {reduction!r}")
    if neutral is not None and reduction != "pmi":
        raise ValueError(f"neutral is used by reduction='pmi' only, got reduction={reduction!r}")
    if steps is not None and (reduction != "mean_logit" or steps < 1):
        raise ValueError(f"steps must be at least 1 and is used by reduction='mean_logit' only, got {steps}")
    tokens, candidates, ids = _prepared(tokenizer, prompts, options, editing)

    if reduction == "mean_logit":

        def work(rows: list[int]) -> list[list[float]]:
            chosen = [[ids[c] for c in candidates[i]] for i in rows]
            return _mean_logits(model, tokenizer, [prompts[i] for i in rows], chosen, editing, steps)

    else:

        def work(rows: list[int]) -> list[list[float]]:
            scores = _log_probs(
                model, tokenizer, [tokens[i] for i in rows], [[ids[c] for c in candidates[i]] for i in rows], editing
            )
            return [[sum(token) for token in row] for row in scores]

    scores = _in_batches(work, tokens, batch_size)
    if reduction == "pmi":
        alone = _alone(model, tokenizer, prompts, candidates, ids, neutral, batch_size)
        scores = [
            [s - alone[_context(p, neutral), c] for s, c in zip(row, cs, strict=True)]
            for row, p, cs in zip(scores, prompts, candidates, strict=True)
        ]
    return _table(scores, candidates, prompts, options)


def option_perplexity(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    options: Options,
    *,
    editing: Editing = SET_BASED,
    batch_size: int = 32,
) -> Float[Tensor, "B n"]:
    """Perplexity of every candidate as the continuation of every prompt: exp of its mean token loss; less is better.

    The official code takes the loss over the whole prompt as well, in which the first token of each element is
    predicted from the last one of the element listed before it, and leaves the positions unedited: that number depends
    on the order. Here only the candidate's tokens count, and they follow the suffix.

    Args, Returns (``+inf`` where a prompt has fewer candidates) and Raises as for `score_options`.
    """
    tokens, candidates, ids = _prepared(tokenizer, prompts, options, editing)

    def work(rows: list[int]) -> list[list[float]]:
        scores = _log_probs(
            model, tokenizer, [tokens[i] for i in rows], [[ids[c] for c in candidates[i]] for i in rows], editing
        )
        return [[sum(token) / len(token) for token in row] for row in scores]

    return torch.exp(-_table(_in_batches(work, tokens, batch_size), candidates, prompts, options))


def _prepared(
    tokenizer: Any, prompts: Sequence[SetPrompt], options: Options, editing: Editing
) -> tuple[list[list[Part]], list[list[str]], dict[str, list[int]]]:
    """Tokens of the prompts, different candidates per prompt, and tokens of the candidates."""
    tokens = tokenize(tokenizer, prompts, editing)
    check_suffix(prompts)
    # equal candidates are computed once, so that they tie exactly and the first one wins, whatever the order
    candidates = [list(dict.fromkeys(row)) for row in _per_prompt(prompts, options)]
    return tokens, candidates, tokenize_texts(tokenizer, sorted({c for row in candidates for c in row}))


def _per_prompt(prompts: Sequence[SetPrompt], options: Options) -> list[list[str]]:
    """One list of candidates per prompt."""
    if isinstance(options, str) or not isinstance(options, Sequence) or not options:
        raise ValueError(f"options must be a list of strings or one such list per prompt, got {options!r}")
    shared = isinstance(options[0], str)
    rows: list[list[Any]] = [list(options)] * len(prompts) if shared else [list(row) for row in options]
    if len(rows) != len(prompts):
        raise ValueError(f"options: {len(rows)} lists for {len(prompts)} prompts; give one per prompt")
    for number, row in enumerate(rows):
        if not row or not all(isinstance(option, str) and option for option in row):
            raise ValueError(f"options of prompt {number} must be non-empty strings, got {row!r}")
    return rows


def _table(
    scores: list[list[float]], candidates: list[list[str]], prompts: Sequence[SetPrompt], options: Options
) -> Float[Tensor, "B n"]:
    """Scores of different candidates back to the options as given."""
    rows = _per_prompt(prompts, options)
    table = torch.full((len(rows), max(map(len, rows))), float("-inf"))
    for i, row in enumerate(rows):
        known = dict(zip(candidates[i], scores[i], strict=True))
        table[i, : len(row)] = torch.tensor([known[option] for option in row])
    return table


def _in_batches(
    work: Callable[[list[int]], list[list[float]]], tokens: list[list[Part]], batch_size: int
) -> list[list[float]]:
    """Run ``work`` on batches of rows of similar length, and give the results in the order of the rows."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def length(row: int) -> int:
        return sum(len(element) for part in tokens[row] for element in elements_of(part))

    order = sorted(range(len(tokens)), key=length)
    found: list[list[float]] = [[] for _ in tokens]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, scores in zip(rows, work(rows), strict=True):
            found[row] = scores
    return found


@torch.no_grad()
def _log_probs(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[Sequence[Part]],
    branches: Sequence[Sequence[Sequence[int]]],
    editing: Editing,
) -> list[list[list[float]]]:
    """Log-probability of every token of every branch, in one pass."""
    filler = padding_token(tokenizer)
    rows = [lay_out(parts, editing, filler, row) for parts, row in zip(tokens, branches, strict=True)]
    batch = collate(rows, filler)
    length = batch["input_ids"].shape[1]
    check_model(model, length=length, last_position=int(batch["position_ids"].max()))
    # rows end with their branches, so the last token of the prompt and everything after it lie in this tail
    tail = 1 + max(sum(map(len, row)) for row in branches)
    keep = {"logits_to_keep": tail} if model._supports_logits_to_keep() else {}
    logits = run(model, with_mask(batch, editing, model), **keep).logits[:, -tail:]
    assert all(row.set_ids[-1] == BRANCH for row in rows)
    picked_rows: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(branches):
        end = tail - sum(map(len, row))  # first token of the first branch
        for branch in row:
            picked_rows += [number] * len(branch)
            predictors += [tail - sum(map(len, row)) - 1, *range(end, end + len(branch) - 1)]
            targets += branch
            end += len(branch)
    index = (torch.tensor(picked_rows, device=logits.device), torch.tensor(predictors, device=logits.device))
    chosen = logits[index].float()
    found = chosen.log_softmax(-1).gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist()
    result = []
    position = 0
    for row in branches:
        scores = []
        for branch in row:
            scores.append(found[position : position + len(branch)])
            position += len(branch)
        result.append(scores)
    return result


def _mean_logits(
    model: Any,
    tokenizer: Any,
    prompts: list[SetPrompt],
    branches: Sequence[Sequence[Sequence[int]]],
    editing: Editing,
    steps: int | None,
) -> list[list[float]]:
    """Official scoring: mean over t of the raw logit of token t at greedy step t."""
    longest = max(len(branch) for row in branches for branch in row)
    count = longest if steps is None else min(steps, longest)
    out = generate(
        model,
        tokenizer,
        prompts,
        editing=editing,
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(out.logits, dim=1).float().cpu()
    fresh = out.sequences[:, -logits.shape[1] :].cpu()
    ends = _end_tokens(model)
    found = []
    for number, row in enumerate(branches):
        finished = [t for t in range(fresh.shape[1]) if int(fresh[number, t]) in ends]
        usable = finished[0] + 1 if finished else fresh.shape[1]
        scores = []
        for branch in row:
            read = [float(logits[number, t, token]) for t, token in enumerate(branch[:usable])]
            scores.append(sum(read) / len(read))
        found.append(scores)
    return found


def _end_tokens(model: Any) -> set[int]:
    """Ids that end a generated text."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _context(prompt: SetPrompt, neutral: str | None) -> str:
    """What stands before a candidate when nothing is known of the question."""
    last = prompt.parts[-1]
    assert isinstance(last, str)
    return last if neutral is None else neutral


def _alone(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    candidates: list[list[str]],
    ids: dict[str, list[int]],
    neutral: str | None,
    batch_size: int,
) -> dict[tuple[str, str], float]:
    """Log-probability of each candidate after its neutral context, each pair once."""
    front = front_tokens(tokenizer)
    pairs = sorted({(_context(p, neutral), c) for p, row in zip(prompts, candidates, strict=True) for c in row})
    written = sorted({context for context, _ in pairs if context})
    contexts = tokenize_texts(tokenizer, written) if written else {}
    found: dict[tuple[str, str], float] = {}
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        before: list[list[Part]] = [[[*front, *contexts.get(context, [])]] for context, _ in chunk]
        if not all(row[0] for row in before):
            raise ValueError(
                "neutral: this tokenizer has no BOS token, so an empty neutral text has nothing to start from"
            )
        scores = _log_probs(model, tokenizer, before, [[ids[candidate]] for _, candidate in chunk], SET_BASED)
        found |= {pair: sum(score[0]) for pair, score in zip(chunk, scores, strict=True)}
    return found


@dataclass(frozen=True)
class OrderReport:
    """What the same questions got when their sets were listed in different orders.

    Args:
        scores: [B, K, n], candidates in the same sequence whatever the order of the set.
        orders: the K orders of each prompt.
        answers: index of the right candidate of each prompt, [B], if known.
    """

    scores: Float[Tensor, "B K n"]
    orders: list[list[Order]]
    answers: Int[Tensor, " B"] | None = None

    @property
    def choices(self) -> Int[Tensor, "B K"]:
        """Index of the best candidate."""
        return self.scores.argmax(-1)

    @property
    def flipped(self) -> Bool[Tensor, " B"]:
        """Prompts whose choice is not the same in all orders."""
        choices = self.choices
        return (choices != choices[:, :1]).any(1)

    @property
    def flip_rate(self) -> float:
        """Share of prompts whose choice is not the same in all orders."""
        return float(self.flipped.float().mean())

    @property
    def spread(self) -> Float[Tensor, " B"]:
        """Greatest difference of a candidate's score between two orders."""
        finite = torch.where(self.scores.isfinite(), self.scores, torch.zeros_like(self.scores))
        return (finite.amax(1) - finite.amin(1)).amax(1)

    @property
    def right(self) -> Bool[Tensor, "B K"]:
        """Whether the choice is the answer."""
        if self.answers is None:
            raise ValueError("answers were not given, so accuracy is not known")
        return self.choices == self.answers[:, None]

    @property
    def accuracies(self) -> Float[Tensor, " K"]:
        """Accuracy of the first, second, … order of every prompt."""
        return self.right.float().mean(0)

    @property
    def mean(self) -> float:
        """Accuracy, mean over orders."""
        return float(self.accuracies.mean())

    @property
    def best(self) -> float:
        """Accuracy of the best order."""
        return float(self.accuracies.max())

    @property
    def worst(self) -> float:
        """Accuracy of the worst order."""
        return float(self.accuracies.min())

    @property
    def best_of(self) -> float:
        """Share of prompts that are right in at least one order (with two orders, the paper's "best of 2")."""
        return float(self.right.any(1).float().mean())

    @property
    def worst_of(self) -> float:
        """Share of prompts that are right in every order (with two orders, the paper's "worst of 2")."""
        return float(self.right.all(1).float().mean())


def ordinary_orders(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[SetPrompt],
    options: Options,
    *,
    answers: Sequence[int] | None = None,
    orders: str | int | Sequence[Sequence[int]] = "all",
    seed: int = 0,
    editing: Editing = PLAIN,
    reduction: Literal["mean_logit", "logprob", "pmi"] = "logprob",
    neutral: str | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], object] | None = None,
) -> OrderReport:
    """Score the options of every prompt once for each order of its set: how order-dependent is the ordinary prompt?

    Also the price of the alternative, permutation voting: it takes ``K`` passes where Set-Based Prompting takes one.

    Args:
        model: a transformers decoder in eval mode.
        tokenizer: its tokenizer.
        prompts: with the elements in their original order.
        options: candidates, the same for every prompt or one list per prompt; they stay in this sequence.
        answers: index of the right option of each prompt.
        orders: ``"all"``, ``"original and reversed"``, a number of random ones (different for each prompt), or a list
            of permutations.
        seed: of random orders; prompt ``i`` uses ``seed + i``.
        editing: `PLAIN`; any other shows the same for that arm.
        reduction: see `score_options`.
        neutral: see `score_options`.
        batch_size: rows per pass; a row is one prompt in one order.
        progress: told (rows done, rows in all).

    Raises:
        TypeError: ``prompts`` is no list of `SetPrompt`.
        ValueError: as for `score_options` and `listing_orders`, prompts with different numbers of orders, or an answer
            that is none of the options.
    """
    check_list(prompts)
    if not prompts:
        raise ValueError("prompts is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    listed = [listing_orders(prompt, orders, seed + i) for i, prompt in enumerate(prompts)]
    counts = {len(each) for each in listed}
    if len(counts) > 1:
        raise ValueError(
            f"orders: prompts have different numbers of orders {sorted(counts)}; give a number they all have"
        )
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"answers: {len(answers)} for {len(prompts)} prompts")
    candidates = _per_prompt(prompts, options)
    for i, answer in enumerate(() if answers is None else answers):
        if not 0 <= answer < len(candidates[i]):
            raise ValueError(f"answers: prompt {i} has options 0..{len(candidates[i]) - 1}, got {answer}")
    rows = [(i, order) for i, each in enumerate(listed) for order in each]
    sizes = [sum(len(e) for s in prompt.sets for e in s.elements) + len(prompt.text) for prompt in prompts]
    queue = sorted(range(len(rows)), key=lambda r: sizes[rows[r][0]])
    table = torch.full((len(rows), max(map(len, candidates))), float("-inf"))
    for start in range(0, len(queue), batch_size):
        some = queue[start : start + batch_size]
        scores = score_options(
            model,
            tokenizer,
            [prompts[rows[r][0]].permuted(*rows[r][1]) for r in some],
            [candidates[rows[r][0]] for r in some],
            reduction,
            editing=editing,
            neutral=neutral,
            batch_size=batch_size,
        )
        table[some, : scores.shape[1]] = scores
        if progress is not None:
            progress(start + len(some), len(rows))
    return OrderReport(
        table.view(len(prompts), counts.pop(), -1), listed, None if answers is None else torch.tensor(list(answers))
    )
