"""The hand-written expert: three rules that, multiplied with a pretrained model, make it answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from torchgraft.language.implicit_instruction.formats import Prompts

Rule = Literal["eos", "uniform", "diversity"]
RULES: tuple[Rule, ...] = ("eos", "uniform", "diversity")
UNIFORM: Mapping[str, float] = {
    "<": -4.0, " <": -4.0, "|": -4.0, " I": -5.0, "I": -5.0, " We": -3.0, "What": -5.0, " should": -6.0,
    " *": 1.0, " -": 1.0, "   ": 1.0, " #": 1.0, " ##": 1.0, "\n": 1.0, "!": 1.0,
}  # fmt: skip
"""Rule 2 as strings: what the fifteen token ids of the official code stand for in Llama-2's vocabulary."""


@dataclass(frozen=True)
class TokenBias:
    """Scores of single tokens.

    Attributes:
        values: score of each token id.
        missing: strings that the vocabulary has not as one token, and that therefore have no score.
    """

    values: Mapping[int, float]
    missing: tuple[str, ...] = ()


def default_token_bias(tokenizer: Any, both_spaces: bool = False) -> TokenBias:
    """The fifteen strings of rule 2 as token ids of a vocabulary (section 6.1 and appendix; ids as in the code).

    Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM), SentencePiece ones (Llama 2, Mistral, Gemma) and plain
    ones are understood.

    Args:
        tokenizer: of transformers, with ``get_vocab`` and ``decode``.
        both_spaces: also score each word in the form with (without) a space in front that the paper does not list.
            The paper's list was made for one vocabulary, in which a word after a line break is another token than in
            others.

    Returns:
        Scores, and the strings that were left out because they are no single token.

    Raises:
        TypeError: when the tokenizer tells no vocabulary.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> bias = default_token_bias(toy_model()[1])  # a vocabulary of single bytes
        >>> bias.values[ord("<")], bias.values[ord("\\n")], bias.missing[0]
        (-4.0, 1.0, ' <')
    """
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "decode")):
        raise TypeError(f"tokenizer must be one of transformers, with get_vocab and decode, got {type(tokenizer)}")
    wanted = dict(UNIFORM)
    if both_spaces:
        for text, score in UNIFORM.items():
            if text.strip():
                wanted.setdefault(text[1:] if text.startswith(" ") else " " + text, score)
    vocabulary = tokenizer.get_vocab()
    found = {text: _single_token(tokenizer, vocabulary, text) for text in wanted}
    values = {token: wanted[text] for text, token in found.items() if token is not None}
    return TokenBias(values, tuple(text for text, token in found.items() if token is None))


def _single_token(tokenizer: Any, vocabulary: Mapping[str, int], text: str) -> int | None:
    """The id of a token that stands for a text, in whichever spelling the vocabulary keeps it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelled = bytes_to_unicode()
    pieces = [text, text.replace(" ", "▁"), "".join(spelled[byte] for byte in text.encode())]
    if len(text.encode()) == 1:
        pieces.append(f"<0x{ord(text):02X}>")
    for piece in pieces:
        token = vocabulary.get(piece)
        # decoding tells a byte-level "Ċ" from a vocabulary in which that is a letter; a first space may be dropped
        if token is not None and tokenizer.decode([token]) in (text, text.removeprefix(" ")):
            return int(token)
    return None


def eos_score(generated: int, slope: float = 15.0, horizon: int = 250) -> float:
    """Rule 1: ``slope * n / horizon`` for ``0 < n < horizon`` generated tokens, else 0.

    Example:
        >>> [eos_score(n) for n in (0, 1, 100, 249, 250, 300)]
        [0.0, 0.06, 6.0, 14.94, 0.0, 0.0]
    """
    return slope * generated / horizon if 0 < generated < horizon else 0.0


class ImplicitInstructProcessor(LogitsProcessor):
    """A product of a language model and three rules, for ``model.generate(logits_processor=[...])``.

    ``p(w | x)`` is proportional to ``p_base(w | x) * softmax(r(x))[w]``, that is, ``r`` is added to the logits. Rule
    "eos" makes the end likelier with every token, "uniform" scores a few tokens (see ``UNIFORM``) at every step, and
    "diversity" takes ``diversity_penalty`` once from each distinct token that stands after the last user tag: in the
    instruction, in the assistant tag, and in what was generated. Section 6 of "Instruction Following without
    Instruction Tuning" (arXiv 2409.14254).

    Everything follows from ``input_ids`` alone; nothing is kept between steps or calls. So caches, batches with padding
    on the left, sampling, beams, assisted decoding and prompt lookup need no care, and the same object serves any
    number of ``generate`` calls for its prompts; other prompts are refused where their ids are known. With beams pass
    ``renormalize_logits=True`` to ``generate`` too, so that a beam's score is the logarithm of a probability of the
    product.

    Differences from the official code: batches (it reads the first row for all); the strings of rule 2 instead of
    Llama-2's token ids; boundaries from the rendered prompt instead of a search for the tags' last five tokens, which
    crashes where those differ; the start rule favours only "Okay", while the official one, off in the paper's
    results, also scores all other first tokens by their first letter. A bonus of 100 past 1024 tokens, that the
    paper's listing mentions and the code computes without adding it, is left out.

    Args:
        tokenizer: names EOS and the tokens of rule 2.
        prompt: ``Prompts`` of ``ChatFormat.prompts``; or the prompt's token ids (T,) or (B, T), padded on the left;
            or only its length T, padding included, and then nothing tells one prompt from another.
        rules: which of the three.
        eos_slope, eos_horizon: see ``eos_score``.
        token_bias: scores of token ids; ``default_token_bias(tokenizer)`` where None.
        diversity_penalty: taken from the score of each token seen.
        instruction_start: column of ``input_ids`` from which tokens count as seen, one for all rows or one for each
            prompt. None: as ``Prompts`` says, else from the first token that is not padding.
        eos_token_id: one id or several; the tokenizer's where None.
        start_rule: the official code's extra rule, off in the paper: "Okay" (+50), then "!" (+15), then no line break
            (-10).

    Raises:
        TypeError, ValueError: for unknown rules, settings that are not finite, a horizon below 1, a tokenizer without
            EOS, or one that has none of the strings of rule 2 as a single token. At a step: when ``input_ids`` do not
            begin with the prompt, or the logits are fewer than the vocabulary.

    Example:
        >>> from torchgraft.language.implicit_instruction import ChatFormat
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> model, tokenizer = toy_model()
        >>> prompts = ChatFormat().prompts(tokenizer, ["Name a colour.", "Count to three."])
        >>> import warnings; warnings.simplefilter("ignore")  # a vocabulary of bytes lacks some strings
        >>> rules = ImplicitInstructProcessor(tokenizer, prompts)
        >>> out = model.generate(**prompts.inputs, max_new_tokens=4, do_sample=False, logits_processor=[rules])
        >>> out.shape[0]
        2
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Prompts | Tensor | int,
        *,
        rules: Collection[str] = RULES,
        eos_slope: float = 15.0,
        eos_horizon: int = 250,
        token_bias: Mapping[int, float] | TokenBias | None = None,
        diversity_penalty: float = 1.5,
        instruction_start: int | Sequence[int] | Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        start_rule: bool = False,
    ) -> None:
        if isinstance(rules, str) or not isinstance(rules, Collection) or any(rule not in RULES for rule in rules):
            raise ValueError(f"rules must be some of {RULES}, got {rules!r}")
        if isinstance(eos_horizon, bool) or not isinstance(eos_horizon, int) or eos_horizon <= 0:
            raise ValueError(f"eos_horizon must be a whole number of tokens above 0, got {eos_horizon!r}")
        for name, value in (("eos_slope", eos_slope), ("diversity_penalty", diversity_penalty)):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        self.rules = frozenset(rules)
        self.eos_slope, self.eos_horizon = float(eos_slope), eos_horizon
        self.diversity_penalty = float(diversity_penalty)
        self.vocabulary = len(tokenizer)
        self.padding = getattr(tokenizer, "pad_token_id", None)
        self.eos = _eos_ids(tokenizer, eos_token_id) if "eos" in self.rules else ()
        self.bias = self._bias(tokenizer, token_bias)
        self.prompt_ids, self.length, start = _prompt(prompt)
        if self.prompt_ids is not None and self.padding is not None and (self.prompt_ids[:, -1] == self.padding).any():
            raise ValueError("prompt must be padded on the left, but a row of it ends with the padding token")
        self.start = _starts(start if instruction_start is None else instruction_start, self.length)
        if self.start is not None and self.prompt_ids is not None and len(self.start) not in (1, len(self.prompt_ids)):
            raise ValueError(
                f"instruction_start must be one column or one for each of {len(self.prompt_ids)} prompts, got "
                f"{len(self.start)}"
            )
        self.opening = _opening(tokenizer) if start_rule else ()

    def _bias(self, tokenizer: Any, given: Mapping[int, float] | TokenBias | None) -> TokenBias:
        if "uniform" not in self.rules:
            return TokenBias({})
        if given is None:
            given = default_token_bias(tokenizer)
            if not given.values:
                raise ValueError("tokenizer has none of the strings of rule 2 as a token; pass token_bias={id: score}")
            if given.missing:
                left_out = ", ".join(map(repr, given.missing))
                warnings.warn(f"no single token for {left_out}; rule 2 leaves them out", stacklevel=3)
        values = given.values if isinstance(given, TokenBias) else given
        if not isinstance(values, Mapping) or any(isinstance(t, bool) or not isinstance(t, int) for t in values):
            raise TypeError(f"token_bias must map token ids to scores, got {given!r}; see default_token_bias for texts")
        bias = given if isinstance(given, TokenBias) else TokenBias(dict(values))
        wrong = {token: score for token, score in bias.values.items() if token < 0 or not math.isfinite(score)}
        if wrong:
            raise ValueError(f"token_bias must give finite scores to token ids, got {wrong}")
        return bias

    def rule_scores(
        self, input_ids: Int[Tensor, "b t"], vocabulary: int, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b v"]:
        """The score vector r of every row.

        Args:
            input_ids: prompt and what was generated so far.
            vocabulary: how many logits there are; those beyond the tokenizer's, of a padded vocabulary, get 0.
            dtype: of the scores.

        Raises:
            ValueError: when the prompt does not stand at the beginning, or there are fewer logits than tokens.
        """
        rows, width = input_ids.shape
        generated = width - self.length
        self._check(input_ids, generated, vocabulary)
        r = torch.zeros(rows, vocabulary, dtype=dtype, device=input_ids.device)
        if self.bias.values:
            ids = torch.tensor(list(self.bias.values), device=r.device)
            r[:, ids] += torch.tensor(list(self.bias.values.values()), dtype=dtype, device=r.device)
        if self.eos:
            r[:, list(self.eos)] += eos_score(generated, self.eos_slope, self.eos_horizon)
        if "diversity" in self.rules:
            # what does not count is replaced by the newest token, which does: equal ids then write equal values
            counted = torch.where(self._counted(input_ids), input_ids, input_ids[:, -1:])
            r.scatter_(1, counted, r.gather(1, counted) - self.diversity_penalty)
        if self.opening and generated < len(self.opening):
            token, score = self.opening[generated]
            r[:, token] += score
        return r

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Logits with the rules' scores added, in the dtype that came."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return (scores + self.rule_scores(input_ids, scores.shape[-1], dtype)).to(scores.dtype)

    def _check(self, input_ids: Tensor, generated: int, vocabulary: int) -> None:
        highest = max([self.vocabulary - 1, *self.bias.values, *self.eos])
        if highest >= vocabulary:
            raise ValueError(f"scores must hold every token id up to {highest}, got {vocabulary} logits a row")
        if generated < 0:
            raise ValueError(
                f"the end of the assistant tag is not in input_ids: the prompt has {self.length} tokens, and input_ids "
                f"only {input_ids.shape[1]} columns"
            )
        prompts = 1 if self.prompt_ids is None else len(self.prompt_ids)
        starts = 1 if self.start is None else len(self.start)
        if any(len(input_ids) % count for count in (prompts, starts)):
            raise ValueError(f"input_ids has {len(input_ids)} rows, no multiple of the {max(prompts, starts)} prompts")
        if self.prompt_ids is not None:
            expected = _repeated(self.prompt_ids.to(input_ids.device), len(input_ids))
            if not torch.equal(expected, input_ids[:, : self.length]):
                raise ValueError(
                    "the assistant tag is not where it was: input_ids do not begin with the prompt given; other "
                    "prompts need a processor of their own"
                )

    def _counted(self, input_ids: Tensor) -> Tensor:
        """(B, T): which columns the diversity rule looks at."""
        if self.start is None:
            if self.padding is None:
                return torch.ones_like(input_ids, dtype=torch.bool)
            return (input_ids != self.padding).cumsum(1) > 0
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        return columns >= _repeated(self.start.to(input_ids.device), len(input_ids))[:, None]


def _repeated(values: Tensor, rows: int) -> Tensor:
    """Beams and several answers to a prompt stand in neighbouring rows."""
    return values.repeat_interleave(rows // len(values), 0)


def _eos_ids(tokenizer: Any, given: int | Sequence[int] | None) -> tuple[int, ...]:
    found = getattr(tokenizer, "eos_token_id", None) if given is None else given
    if found is None:
        raise ValueError("tokenizer has no EOS token; set tokenizer.eos_token, pass eos_token_id=, or leave out 'eos'")
    ids = (found,) if isinstance(found, int) else tuple(found)
    if not ids or min(ids) < 0:
        raise ValueError(f"eos_token_id must be one token id or several, got {given!r}")
    return ids


def _prompt(prompt: Prompts | Tensor | int) -> tuple[Tensor | None, int, Tensor | None]:
    """Token ids (B, T) where known, T, and where instructions begin where known."""
    if isinstance(prompt, Prompts):
        return prompt.input_ids, prompt.input_ids.shape[1], prompt.instruction_start
    if isinstance(prompt, bool) or not isinstance(prompt, (int, Tensor)):
        raise TypeError(f"prompt must be Prompts, token ids or a length, got {type(prompt).__name__}")
    if isinstance(prompt, int):
        if prompt < 1:
            raise ValueError(f"prompt must have at least one token, got a length of {prompt}")
        return None, prompt, None
    if prompt.ndim not in (1, 2) or prompt.is_floating_point() or prompt.numel() == 0:
        raise ValueError(f"prompt must be token ids (T,) or (B, T), got {tuple(prompt.shape)}, {prompt.dtype}")
    ids = prompt[None] if prompt.ndim == 1 else prompt
    return ids, ids.shape[1], None


def _starts(given: int | Sequence[int] | Tensor | None, length: int) -> Tensor | None:
    if given is None:
        return None
    starts = torch.as_tensor([given] if isinstance(given, int) else given)
    if starts.ndim != 1 or starts.is_floating_point() or not len(starts):
        raise ValueError(f"instruction_start must be one column or one for each prompt, got {given!r}")
    if int(starts.min()) < 0 or int(starts.max()) >= length:
        raise ValueError(f"instruction_start must lie within the prompt's {length} columns, got {starts.tolist()}")
    return starts


def _opening(tokenizer: Any) -> tuple[tuple[int, float], ...]:
    vocabulary, found = tokenizer.get_vocab(), []
    for text, score in (("Okay", 50.0), ("!", 15.0), ("\n", -10.0)):
        token = _single_token(tokenizer, vocabulary, text)
        if token is None:
            raise ValueError(f"start_rule needs {text!r} as one token, and the tokenizer has it not")
        found.append((token, score))
    return tuple(found)
