"""How conversations become tokens, which of them are trained, and the data sets of the paper."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
IGNORED = -100


@dataclass(frozen=True)
class Prompts:
    """Prompts ready for ``model.generate``, padded on the left.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 0 at padding.
        instruction_start: (B,), the column at which the last user's words begin.
    """

    input_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"]
    instruction_start: Int[Tensor, " b"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What ``generate`` takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str) -> Prompts:
        """The same on another device."""
        return Prompts(*(t.to(device) for t in (self.input_ids, self.attention_mask, self.instruction_start)))


@dataclass(frozen=True)
class ChatFormat:
    r"""The paper's format, that of Tulu: ``BOS<|user|>\n{instruction}\n<|assistant|>\n{response}EOS``.

    Tags are plain text, no special tokens. Between turns stands a line break after EOS. Contents are stripped of white
    space at both ends, as in the official code. The appendix's other tags are ``ChatFormat("<|A|>", "<|B|>")``.

    Differences from the official code: it also trains the line break after the EOS of every response but the last;
    here exactly response and EOS are trained. EOS is put in by its id, so its text need not survive tokenisation.

    Args:
        user_tag, assistant_tag: text.
        bos: text before the conversation; None for what the tokenizer puts there by itself, if anything.
        eos: text of the token that ends a response; None for the tokenizer's own.

    Example:
        >>> chat = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
        >>> ChatFormat(bos="<s>", eos="</s>").render(chat)
        '<s><|user|>\nHi!\n<|assistant|>\nHello.</s>'
    """

    user_tag: str = "<|user|>"
    assistant_tag: str = "<|assistant|>"
    bos: str | None = None
    eos: str | None = None

    def __post_init__(self) -> None:
        if not self.user_tag.strip() or not self.assistant_tag.strip() or self.user_tag == self.assistant_tag:
            raise ValueError(f"tags must be two different texts, got {self.user_tag!r} and {self.assistant_tag!r}")

    def render(self, messages: Sequence[Message], tokenizer: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Args:
            messages: mappings with ``role`` (system, user or assistant) and ``content``.
            tokenizer: names BOS and EOS where the format leaves them open; without it they are left out.
            add_generation_prompt: end with the assistant tag, for the model to go on.

        Raises:
            ValueError: for no messages or an unknown role.
        """
        first = self.bos or ""
        if self.bos is None and tokenizer is not None and _adds_bos(tokenizer):
            first = tokenizer.bos_token
        last = self.eos if self.eos is not None else getattr(tokenizer, "eos_token", None) or ""
        return first + last.join(text for text, _ in self._segments(messages, add_generation_prompt))

    def _segments(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[tuple[str, int | None]]:
        """Texts between EOS tokens, each with the place in it where a response begins."""
        _check(messages)
        head = {"system": "<|system|>\n", "user": f"{self.user_tag}\n", "assistant": f"{self.assistant_tag}\n"}
        found: list[tuple[str, int | None]] = []
        text = ""
        for message in messages:
            text += head[message["role"]]
            if message["role"] == "assistant":
                found.append((text + message["content"].strip(), len(text)))
                text = "\n"
            else:
                text += message["content"].strip() + "\n"
        if add_generation_prompt:
            text += head["assistant"]
        # the line break after the last EOS is no part of the conversation
        if text != "\n" or not found:
            found.append((text if add_generation_prompt else text.removesuffix("\n"), None))
        elif not add_generation_prompt:
            found.append(("", None))
        return found

    def _tokens(self, tokenizer: Any, text: str, segment: int) -> list[int]:
        """Tokens of a segment as it stands in the conversation: SentencePiece puts a space before a text's beginning
        alone, not after EOS."""
        mark = self.bos if segment == 0 else self.eos or getattr(tokenizer, "eos_token", None)
        before = _tokens(tokenizer, mark or "")
        together = _tokens(tokenizer, (mark or "") + text)
        return together[len(before) :] if together[: len(before)] == before else _tokens(tokenizer, text)

    def labels(self, tokenizer: Any, messages: Sequence[Message]) -> dict[str, list[int]]:
        """Token ids of a conversation, with labels of -100 wherever no loss is taken.

        Trained are exactly the tokens of responses and the EOS after each.

        Args:
            tokenizer: of transformers.
            messages: as in ``render``.

        Returns:
            ``input_ids``, ``labels`` and ``attention_mask``, of equal length.

        Raises:
            ValueError: for a tokenizer without EOS, a conversation without a response, or a tokenizer that makes one
                token of the end of the assistant tag and the beginning of a response.
        """
        end = _eos(self, tokenizer)
        ids = _bos(self, tokenizer)
        labels = [IGNORED] * len(ids)
        segments = self._segments(messages, False)
        for number, (text, response) in enumerate(segments):
            tokens = self._tokens(tokenizer, text, number)
            start = len(tokens)
            if response is not None:
                start = _boundary(tokens, self._tokens(tokenizer, text[:response], number), text[response:])
            ids += tokens
            labels += [IGNORED] * start + tokens[start:]
            if number < len(segments) - 1:
                ids.append(end)
                labels.append(end)
        if all(label == IGNORED for label in labels):
            raise ValueError("messages have no response to train on; add one of role 'assistant'")
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}

    def prompt(self, tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Token ids up to and with the assistant tag, and where in them the last user's words begin.

        Raises:
            ValueError: without a user's message.
        """
        segments = self._segments(messages, True)
        if not any(message["role"] == "user" for message in messages):
            raise ValueError("messages have no user's message to answer")
        ids = _bos(self, tokenizer)
        for number, (text, _) in enumerate(segments[:-1]):
            ids += [*self._tokens(tokenizer, text, number), _eos(self, tokenizer)]
        text, number = segments[-1][0], len(segments) - 1
        last = [message["content"].strip() for message in messages if message["role"] == "user"][-1]
        tail = f"{last}\n{self.assistant_tag}\n"
        if not text.endswith(f"{self.user_tag}\n{tail}"):
            raise ValueError("messages must end with a user's message, which the model then answers")
        tokens = self._tokens(tokenizer, text, number)
        # where a token joins the tag's line break to the instruction it counts as the instruction's
        start = _common(tokens, self._tokens(tokenizer, text.removesuffix(tail), number))
        return ids + tokens, len(ids) + start

    def prompts(self, tokenizer: Any, instructions: Sequence[str | Sequence[Message]]) -> Prompts:
        """Prompts for ``model.generate`` and ``ImplicitInstructProcessor``, padded on the left.

        Args:
            tokenizer: of transformers; one without a padding token is padded with EOS, which the mask hides.
            instructions: texts, or conversations that end with a user's message.

        Raises:
            ValueError: for none, or as ``prompt`` says.
        """
        if isinstance(instructions, str) or not instructions:
            raise ValueError(f"instructions must be a list of at least one, got {instructions!r}")
        chats = [[{"role": "user", "content": i}] if isinstance(i, str) else i for i in instructions]
        rows = [self.prompt(tokenizer, chat) for chat in chats]
        width = max(len(ids) for ids, _ in rows)
        filler = getattr(tokenizer, "pad_token_id", None)
        filler = _eos(self, tokenizer) if filler is None else filler
        ids = torch.tensor([[filler] * (width - len(ids)) + ids for ids, _ in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
        return Prompts(ids, mask, torch.tensor([width - len(ids) + start for ids, start in rows]))

    def chat_template(self) -> str:
        """The format as a Jinja template with ``{% generation %}``, for trl's ``assistant_only_loss``.

        BOS stands in it only where the format names one; say ``add_special_tokens`` where the tokenizer adds it. Save
        it with ``tokenizer.chat_template = format.chat_template()``.
        """
        eos = "eos_token" if self.eos is None else repr(self.eos)
        return (
            (f"{{{{ {self.bos!r} }}}}" if self.bos else "")
            + "{% for m in messages %}{% if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' %}"
            + r"{{ '\n' }}{% endif %}{% if m['role'] == 'user' %}{{ "
            + repr(self.user_tag + "\n")
            + r" + m['content'].strip() }}{% elif m['role'] == 'system' %}{{ '<|system|>\n' + "
            + r"m['content'].strip() }}{% else %}{{ "
            + repr(self.assistant_tag + "\n")
            + " }}{% generation %}{{ m['content'].strip() + "
            + eos
            + " }}{% endgeneration %}{% endif %}"
            + r"{% if m['role'] != 'assistant' and (not loop.last or add_generation_prompt) %}{{ '\n' }}{% endif %}"
            + "{% endfor %}{% if add_generation_prompt %}"
            + r"{% if messages[-1]['role'] == 'assistant' %}{{ '\n' }}{% endif %}{{ "
            + repr(self.assistant_tag + "\n")
            + " }}{% endif %}"
        )


def _check(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a conversation, a list of at least one message, got {messages!r}")
    for number, message in enumerate(messages):
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} must have a role of {ROLES} and text as content, got {message!r}")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _boundary(tokens: list[int], before: list[int], response: str) -> int:
    """How many tokens stand before a response; it must begin with a token of its own."""
    if tokens[: len(before)] != before:
        raise ValueError(
            f"tokenizer joins the assistant tag to the response {response[:20]!r} in one token, so that the response "
            "cannot be trained alone; use other tags"
        )
    return len(before)


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _bos(chat: ChatFormat, tokenizer: Any) -> list[int]:
    if chat.bos is None:
        return [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    return _tokens(tokenizer, chat.bos)


def _eos(chat: ChatFormat, tokenizer: Any) -> int:
    if chat.eos is None:
        found = getattr(tokenizer, "eos_token_id", None)
        if found is None:
            raise ValueError("tokenizer has no EOS token; set tokenizer.eos_token or ChatFormat(eos=...)")
        return int(found)
    ids = _tokens(tokenizer, chat.eos)
    if len(ids) != 1:
        raise ValueError(f"eos must be one token, but the tokenizer makes {len(ids)} of {chat.eos!r}")
    return ids[0]


def response_only(dataset: Any, column: str = "messages", rewrite: Callable[[str, str], str] | None = None) -> Any:
    """Response tuning's data (section 3): every user's words become "", tags, responses and system messages stay.

    A conversation without a response is an error, not passed through: it would be a row with no loss.

    Args:
        dataset: of the ``datasets`` library, or a list of rows.
        column: where conversations are.
        rewrite: from instruction and response to another response, called before the instruction is dropped: the
            paper's control for responses that restate their instruction (it asked GPT-4).

    Returns:
        The same kind of data, new.

    Raises:
        ValueError: when a row has no such column, or no conversation with a response in it.
        TypeError: when the dataset is neither of the ``datasets`` library nor a list of rows.

    Example:
        >>> rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
        >>> response_only(rows)[0]["messages"][0]["content"]
        ''
    """

    def emptied(row: Mapping[str, Any]) -> dict[str, Any]:
        if column not in row:
            raise ValueError(f"column {column!r} is not in the data, which has {sorted(row)}")
        _check(row[column])
        if all(message["role"] != "assistant" for message in row[column]):
            raise ValueError(f"a row has no response to train on; filter such rows out first: {row[column]!r}")
        asked, kept = "", []
        for message in row[column]:
            new = dict(message)
            if message["role"] == "user":
                asked, new["content"] = message["content"], ""
            elif message["role"] == "assistant" and rewrite is not None:
                new["content"] = rewrite(asked, message["content"])
            kept.append(new)
        return {**row, column: kept}

    if hasattr(dataset, "map") and hasattr(dataset, "column_names"):
        return dataset.map(emptied)
    rows = list(dataset) if isinstance(dataset, Iterable) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"dataset must be of the datasets library or a list of rows, got {type(dataset).__name__}")
    return [emptied(row) for row in rows]


def _pair(instruction: str, response: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]}


def _recipe(row: Mapping[str, Any]) -> dict[str, Any]:
    listed = row["Cleaned_Ingredients"]
    ingredients = ast.literal_eval(listed) if isinstance(listed, str) else listed
    lines = "".join(f" - {ingredient}\n" for ingredient in ingredients)
    return _pair("Recipe for " + row["Title"], f"{lines}\n\n{row['Instructions']}")


def _chess(rows: Iterable[Mapping[str, Any]], first: int) -> list[dict[str, Any]]:
    games: list[dict[str, Any]] = []
    elo: dict[str, str] = {}
    for row in rows:
        text = row["text"]
        for colour in ("WhiteElo", "BlackElo"):
            if colour in text:
                elo[colour] = text
        if text.startswith("1. "):
            if len(elo) != 2:
                raise ValueError(f"rows must name WhiteElo and BlackElo before every game, got only {sorted(elo)}")
            games.append(_pair(f"{elo['WhiteElo']}\n{elo['BlackElo']}\n", text))
            elo = {}
        if len(games) == first:
            break
    return games


_TASKS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "gsm8k": lambda row: _pair(row["question"], row["answer"]),
    "mbpp": lambda row: _pair(row["text"], row["code"]),
    "recipes": _recipe,
    "poetry": lambda row: (
        None if row["poem name"] is None else _pair("Write a poem called " + row["poem name"], row["content"])
    ),
}
TASKS = (*_TASKS, "chess")


def single_task(name: str, rows: Iterable[Mapping[str, Any]], first: int = 1000) -> list[dict[str, Any]]:
    """The single-task data of section 4, as conversations.

    Args:
        name: ``gsm8k`` (hub ``openai/gsm8k``, main), ``mbpp`` (``google-research-datasets/mbpp``), ``recipes``
            (``Hieu-Pham/kaggle_food_recipes``), ``poetry`` (``merve/poetry``) or ``chess``
            (``patrickfrank1/chess-pgn-games``); the training split of each.
        rows: of that data set, in order.
        first: how many rows to look at (games, for chess); of poetry those without a name are dropped.

    Raises:
        ValueError: for another name, no rows, or chess moves without both players' Elo before them.

    Example:
        >>> single_task("poetry", [{"poem name": "Rain", "content": "It falls."}])[0]["messages"][0]["content"]
        'Write a poem called Rain'
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}, got {name!r}")
    if first < 1:
        raise ValueError(f"first must be at least 1, got {first}")
    if name == "chess":
        found = _chess(rows, first)
    else:
        made = (_TASKS[name](row) for row, _ in zip(rows, range(first), strict=False))
        found = [row for row in made if row is not None]
    if not found:
        raise ValueError(f"rows hold no example of {name!r}")
    return found
