import copy
import math
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.language.models import tiny
from torchgraft.language.implicit_instruction import (
    UNIFORM,
    ChatFormat,
    ImplicitInstructProcessor,
    Prompts,
    ResponseCollator,
    TokenBias,
    adherence,
    default_token_bias,
    eos_score,
    published_settings,
    response_loss,
    response_only,
    response_ranking,
    response_scores,
    single_task,
    training_examples,
    tune,
)
from torchgraft.language.set_based_prompting import toy_model

FAMILIES = ("gpt2", "llama", "qwen2", "mistral")
every_family = pytest.mark.parametrize("family", FAMILIES)
WIDE = dict(vocab_size=264, bos_token_id=None, eos_token_id=256, pad_token_id=256, max_position_embeddings=512)
CHAT = [{"role": "user", "content": " Name a colour. "}, {"role": "assistant", "content": "Blue.\n"}]
BIAS = {ord("<"): -4.0, ord("\n"): 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return toy_model()[1]


def build(family, dtype=torch.float32):
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if family == "gpt2" else {}
    model = tiny(family, dtype, **WIDE | still)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 256
    return model


def processor(tokenizer, prompt, **changes):
    return ImplicitInstructProcessor(tokenizer, prompt, **{"token_bias": BIAS} | changes)


# The score vector of the official code: InsTunerModel(tokenizer, "eos-uniform-diversity", vocab_size=32000,
# device="cpu", eos_id=2)(ids).logits[0, -1] of john-hewitt/implicit-ins at fe1c2d8, run on Llama-2's token ids below;
# entries that are not listed are 0.
TAG_USER, TAG_ASSISTANT = [29989, 1792, 29989, 29958, 13], [465, 22137, 29989, 29958, 13]
LLAMA_PROMPT = [1, 529, *TAG_USER, 1724, 338, 278, 7483, 310, 3444, 29973, 13, 29966, 29989, *TAG_ASSISTANT]
START = 7
LLAMA_BIAS = {
    29966: -4.0, 529: -4.0, 29989: -4.0, 306: -5.0, 29902: -5.0, 1334: -3.0, 5618: -5.0, 881: -6.0, 334: 1.0, 448: 1.0,
    1678: 1.0, 396: 1.0, 444: 1.0, 13: 1.0, 29991: 1.0,
}  # fmt: skip
OFFICIAL_0 = {
    13: -0.5, 278: -1.5, 306: -5.0, 310: -1.5, 334: 1.0, 338: -1.5, 396: 1.0, 444: 1.0, 448: 1.0, 465: -1.5, 529: -4.0,
    881: -6.0, 1334: -3.0, 1678: 1.0, 1724: -1.5, 3444: -1.5, 5618: -5.0, 7483: -1.5, 22137: -1.5, 29902: -5.0,
    29958: -1.5, 29966: -5.5, 29973: -1.5, 29989: -5.5, 29991: 1.0,
}  # fmt: skip
OFFICIAL = {
    (): OFFICIAL_0,
    (3681,): OFFICIAL_0 | {2: 0.06, 3681: -1.5},
    (3681, 338, 278, 7483, 13, 13, *[306] * 94): OFFICIAL_0 | {2: 6.0, 306: -6.5, 3681: -1.5},
}


class Llama2:
    """As much of Llama-2's tokenizer as the processor asks for."""

    eos_token_id, pad_token_id = 2, None

    def __len__(self):
        return 32000


@pytest.mark.parametrize("generated", OFFICIAL, ids=len)
def test_scores_equal_those_of_the_official_code(generated):
    rules = ImplicitInstructProcessor(
        Llama2(), torch.tensor(LLAMA_PROMPT), token_bias=LLAMA_BIAS, instruction_start=START
    )
    r = rules.rule_scores(torch.tensor([LLAMA_PROMPT + list(generated)]), 32000)[0]
    expected = torch.zeros(32000)
    for token, score in OFFICIAL[generated].items():
        expected[token] = score
    torch.testing.assert_close(r, expected, atol=1e-5, rtol=0)


def naive(ids, start, length, vocabulary, bias, eos=256):
    r = np.zeros(vocabulary)
    for token, score in bias.items():
        r[token] += score
    n = len(ids) - length
    if 0 < n < 250:
        r[eos] += 15 * n / 250
    for token in set(ids[start:]):
        r[token] -= 1.5
    return r


def test_scores_equal_a_loop_and_add(tokenizer):
    prompts = ChatFormat().prompts(tokenizer, ["Hi!", "Which towns are there, then?"])
    rules = processor(tokenizer, prompts)
    more = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([prompts.input_ids, more], 1)
    r = rules.rule_scores(ids, 264, torch.float64)
    for row in range(2):
        start, length = int(prompts.instruction_start[row]), prompts.input_ids.shape[1]
        expected = naive(ids[row].tolist(), start, length, 264, BIAS)
        np.testing.assert_allclose(r[row].numpy(), expected, atol=1e-12)
    assert r[0, ord("\n")] == -0.5
    assert (r[:, 257:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_product_of_experts(tokenizer, dtype):
    prompts = ChatFormat().prompts(tokenizer, ["Hi!"])
    rules = processor(tokenizer, prompts)
    scores = torch.randn(1, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    r = rules.rule_scores(prompts.input_ids, 257, torch.float64)
    product = scores.double().softmax(-1) * r.softmax(-1)
    found = rules(prompts.input_ids, scores)
    assert found.dtype == dtype
    close = dict(atol=2e-2, rtol=0) if dtype == torch.bfloat16 else dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(found.double().softmax(-1), product / product.sum(), **close)


def test_no_rules_are_the_identity_and_impossible_stays_impossible(tokenizer):
    prompts = ChatFormat().prompts(tokenizer, ["Hi!"])
    scores = torch.randn(1, 257)
    assert torch.equal(ImplicitInstructProcessor(tokenizer, prompts, rules=())(prompts.input_ids, scores), scores)
    scores[0, 5] = -math.inf
    before = scores.clone()
    assert processor(tokenizer, prompts)(prompts.input_ids, scores)[0, 5] == -math.inf
    assert torch.equal(scores, before)


def test_end_score_at_the_papers_places(tokenizer):
    expected = {0: 0.0, 1: 0.06, 100: 6.0, 249: 14.94, 250: 0.0, 300: 0.0}
    rules = processor(tokenizer, 2, rules=("eos",))
    for n, score in expected.items():
        assert eos_score(n) == pytest.approx(score)
        r = rules.rule_scores(torch.full((1, 2 + n), 7), 257)
        assert r[0, 256].item() == pytest.approx(score)
        assert r[0, :256].abs().max() == 0
    several = processor(tokenizer, 2, rules=("eos",), eos_token_id=[3, 9]).rule_scores(torch.full((1, 102), 7), 257)
    assert several[0, [3, 9]].tolist() == pytest.approx([6.0, 6.0])


def test_diversity_counts_each_token_once_and_no_padding(tokenizer):
    rules = processor(tokenizer, 4, rules=("diversity",))
    r = rules.rule_scores(torch.tensor([[256, 256, 5, 6, 6, 6, 8]]), 257)
    assert {i: r[0, i].item() for i in r[0].nonzero()[:, 0].tolist()} == {5: -1.5, 6: -1.5, 8: -1.5}
    # a generated end token is no padding
    assert rules.rule_scores(torch.tensor([[256, 256, 5, 6, 256]]), 257)[0, 256] == -1.5
    late = processor(tokenizer, 4, rules=("diversity",), instruction_start=3)
    assert late.rule_scores(torch.tensor([[4, 5, 6, 7, 5]]), 257)[0].nonzero()[:, 0].tolist() == [5, 7]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 19), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 6), st.integers(0, 5),
)  # fmt: skip
def test_any_rows_equal_the_loop(rows, length, start):
    tokenizer = type("T", (Llama2,), {"__len__": lambda self: 20})()
    rules = ImplicitInstructProcessor(
        tokenizer, length, token_bias={3: -4.0, 2: 1.0}, instruction_start=min(start, length - 1)
    )
    r = rules.rule_scores(torch.tensor(rows), 20, torch.float64)
    for found, row in zip(r, rows, strict=True):
        np.testing.assert_allclose(found, naive(row, min(start, length - 1), length, 20, {3: -4.0, 2: 1.0}, 2))


@every_family
def test_batches_caches_and_one_at_a_time_agree(tokenizer, family):
    model = build(family, torch.float64)
    asked = ["Hi!", "Which towns are there, then?", "Count."]
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=256)

    def run(instructions, **more):
        prompts = ChatFormat().prompts(tokenizer, instructions)
        out = model.generate(**prompts.inputs, **how | more, logits_processor=[processor(tokenizer, prompts)])
        return out[:, prompts.input_ids.shape[1] :]

    batch = run(asked)
    assert torch.equal(batch, run(asked, use_cache=False))
    for row, instruction in zip(batch, asked, strict=True):
        alone = run([instruction])[0]
        assert torch.equal(row[: len(alone)], alone)
    prompts = ChatFormat().prompts(tokenizer, asked)
    assert not torch.equal(batch, model.generate(**prompts.inputs, **how)[:, prompts.input_ids.shape[1] :])


def sequence_score(model, rules, ids, prompt):
    """Log-probability of the product, token by token without a cache."""
    total = 0.0
    for at in range(prompt, ids.shape[1]):
        scores = rules(ids[:, :at], model(ids[:, :at]).logits[:, -1])
        scores[:, 256] = -math.inf  # the end, which min_new_tokens forbids
        total += scores.log_softmax(-1)[0, ids[0, at]].item()
    return total


def test_beams_and_prompt_lookup(tokenizer):
    model = build("llama", torch.float64)
    prompts = ChatFormat().prompts(tokenizer, ["Hi!", "Count, please."])
    rules = processor(tokenizer, prompts)
    length = prompts.input_ids.shape[1]
    out = model.generate(
        **prompts.inputs, max_new_tokens=4, num_beams=3, do_sample=False, logits_processor=[rules], pad_token_id=256,
        renormalize_logits=True, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, min_new_tokens=4,
    )  # fmt: skip
    one = ChatFormat().prompts(tokenizer, ["Count, please."])
    ids = out.sequences[1:2]
    alone = processor(tokenizer, one)
    with torch.no_grad():
        told = sequence_score(model, alone, ids, length)
    assert ids[0, :length].tolist() == one.input_ids[0].tolist()
    assert out.sequences_scores[1].item() == pytest.approx(told, abs=1e-4)

    plain = dict(max_new_tokens=12, do_sample=False, pad_token_id=256, logits_processor=[alone])
    greedy = model.generate(**one.inputs, **plain)
    assert torch.equal(greedy, model.generate(**one.inputs, **plain, prompt_lookup_num_tokens=3))

    several = model.generate(
        **prompts.inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3, logits_processor=[rules],
        pad_token_id=256,
    )  # fmt: skip
    assert several.shape == (4, length + 3)


@every_family
def test_rows_end_when_they_would_alone(tokenizer, family):
    model, asked = build(family, torch.float64), ["Hi!", "Which towns are there, then?", "Count.", "And now?"]

    def run(instructions):
        prompts = ChatFormat().prompts(tokenizer, instructions)
        rules = processor(tokenizer, prompts, eos_slope=180.0)
        out = model.generate(
            **prompts.inputs, max_new_tokens=24, do_sample=False, pad_token_id=256, logits_processor=[rules]
        )
        return [
            row[: row.index(256) + 1] if 256 in row else row for row in out[:, prompts.input_ids.shape[1] :].tolist()
        ]

    together = run(asked)
    assert len({len(row) for row in together}) > 1
    assert min(len(row) for row in together) < 24
    assert together == [run([instruction])[0] for instruction in asked]


@every_family
def test_assisted_decoding_static_cache_and_beams_that_sample(tokenizer, family):
    model, other = build(family, torch.float64), build(family, torch.float64)
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(0.05)
    one = ChatFormat().prompts(tokenizer, ["Count, please."])
    how = dict(max_new_tokens=10, pad_token_id=256, logits_processor=[processor(tokenizer, one)])
    greedy = model.generate(**one.inputs, **how, do_sample=False)
    assert torch.equal(greedy, model.generate(**one.inputs, **how, do_sample=False, assistant_model=other))
    assert torch.equal(greedy, model.generate(**one.inputs, **how, do_sample=False, cache_implementation="static"))
    # sampled beams cannot leave what a large enough bias leaves over
    rules = processor(tokenizer, one, token_bias={65: 1e4, 66: 1e4}, rules=("uniform",))
    beams = model.generate(
        **one.inputs, **how | dict(logits_processor=[rules]), do_sample=True, num_beams=3, num_return_sequences=3,
        renormalize_logits=True,
    )  # fmt: skip
    assert set(beams[:, one.input_ids.shape[1] :].flatten().tolist()) <= {65, 66}


def test_half_precision_and_padded_vocabularies_generate(tokenizer):
    model = build("llama", torch.bfloat16)
    prompts = ChatFormat().prompts(tokenizer, ["Hi!", "Which towns are there, then?"])
    rules = processor(tokenizer, prompts, token_bias={65: 1e4}, rules=("uniform",))
    out = model.generate(
        **prompts.inputs, max_new_tokens=3, do_sample=False, pad_token_id=256, logits_processor=[rules]
    )
    assert model.get_output_embeddings().weight.shape[0] == 264 > len(tokenizer)
    assert (out[:, -3:] == 65).all()


def test_one_processor_serves_many_calls_but_no_other_prompts(tokenizer):
    model = build("llama", torch.float64)
    prompts = ChatFormat().prompts(tokenizer, ["Hi!", "Count."])
    rules = processor(tokenizer, prompts)
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=256, logits_processor=[rules])
    first = model.generate(**prompts.inputs, **how)
    model.generate(**prompts.inputs, **how | dict(do_sample=True))
    assert torch.equal(first, model.generate(**prompts.inputs, **how))
    longer = ChatFormat().prompts(tokenizer, ["Which towns are there, then?", "Count."])
    for other in (longer, ChatFormat().prompts(tokenizer, ["Ho!", "Count."])):
        with pytest.raises(ValueError, match="do not begin with the prompt"):
            model.generate(**other.inputs, **how)


def test_sampling_follows_the_product(tokenizer):
    model, one = build("gpt2"), ChatFormat().prompts(tokenizer, ["Hi!"])
    # a penalty that leaves nothing but what was not seen: only a token never seen can come
    rules = processor(tokenizer, one, rules=("diversity",), diversity_penalty=1e4)
    torch.manual_seed(0)
    out = model.generate(
        **one.inputs, do_sample=True, num_return_sequences=8, max_new_tokens=20, logits_processor=[rules],
        pad_token_id=256,
    )  # fmt: skip
    seen = set(one.input_ids[0, one.instruction_start[0] :].tolist())
    for row in out[:, one.input_ids.shape[1] :].tolist():
        said = row[: row.index(256) + 1] if 256 in row else row
        assert len(set(said)) == len(said)
        assert not set(said) & seen


def piece_tokenizer(pieces, **options):
    """A tokenizer with just these pieces, in the spelling of SentencePiece or of bytes."""
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, pieces[0]))
    inner.decoder = options.pop("decoder")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=pieces[0])


def test_strings_are_found_in_every_spelling(tokenizer):
    spelled = [text.replace(" ", "▁") if text != "\n" else "<0x0A>" for text in UNIFORM]
    # "Ċ" is a letter here, not a line break
    sentence_piece = piece_tokenizer(
        ["?", "Ċ", *spelled],
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    found = default_token_bias(sentence_piece)
    assert found.missing == ()
    assert found.values == {i + 2: score for i, score in enumerate(UNIFORM.values())}
    assert len(found.values) == 15

    letters = pre_tokenizers.ByteLevel.alphabet()
    spelled = [text.replace(" ", "Ġ").replace("\n", "Ċ") for text in UNIFORM if text != " ##"]
    pieces = ["?", *spelled, *sorted(set(letters) - set(spelled)), "Ġ<x", "Ġ!"]
    byte_level = piece_tokenizer(pieces, decoder=decoders.ByteLevel())
    found = default_token_bias(byte_level)
    assert found.missing == (" ##",)
    assert found.values[pieces.index("Ċ")] == 1.0
    assert found.values[pieces.index("Ġ<")] == -4.0
    both = default_token_bias(byte_level, both_spaces=True)
    assert both.values[pieces.index("Ġ!")] == 1.0
    assert both.values[pieces.index("#")] == 1.0
    with pytest.warns(UserWarning, match="'   '"):
        assert ImplicitInstructProcessor(tokenizer, 3).bias.missing[0] == " <"


def test_start_rule(tokenizer):
    pieces = ["[end]", "Okay", "!", "\n"]
    small = piece_tokenizer(pieces, decoder=decoders.Fuse())
    rules = ImplicitInstructProcessor(small, 1, rules=(), start_rule=True)
    found = [rules.rule_scores(torch.zeros(1, 1 + n, dtype=torch.int64), 4)[0].tolist() for n in range(4)]
    assert found == [[0, 50, 0, 0], [0, 0, 15, 0], [0, 0, 0, -10], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="start_rule"):
        ImplicitInstructProcessor(tokenizer, 1, rules=(), start_rule=True)


@pytest.mark.parametrize(
    ("prompt", "changes", "error", "match"),
    [
        (3, dict(rules=("eos", "length")), ValueError, "rules must be"),
        (3, dict(rules="eos"), ValueError, "rules must be"),
        (3, dict(rules=None), ValueError, "rules must be"),
        (3, dict(token_bias={" I": -5.0}), TypeError, "token ids"),
        (3, dict(token_bias=[1, 2]), TypeError, "token ids"),
        (torch.tensor([[5, 6, 7], [5, 256, 256]]), {}, ValueError, "padded on the left"),
        (3, dict(eos_horizon=0), ValueError, "eos_horizon"),
        (3, dict(eos_slope=math.nan), ValueError, "eos_slope"),
        (3, dict(diversity_penalty=math.inf), ValueError, "diversity_penalty"),
        (3, dict(token_bias={-1: 2.0}), ValueError, "token_bias"),
        (3, dict(instruction_start=3), ValueError, "instruction_start"),
        (torch.tensor([[5, 6, 7], [5, 6, 8]]), dict(instruction_start=[0, 1, 1]), ValueError, "each of 2 prompts"),
        (0, {}, ValueError, "prompt"),
        (torch.zeros(2, 3), {}, ValueError, "prompt"),
        ("Hi", {}, TypeError, "prompt"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_settings_are_named(tokenizer, prompt, changes, error, match):
    with pytest.raises(error, match=match):
        processor(tokenizer, prompt, **changes)


def test_wrong_tokenizers_and_inputs_are_named(tokenizer):
    no_end = copy.deepcopy(tokenizer)
    no_end.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        ImplicitInstructProcessor(no_end, 3, token_bias=BIAS)
    ImplicitInstructProcessor(no_end, 3, rules=("diversity",))
    with pytest.raises(ValueError, match="no EOS"):
        ChatFormat().labels(no_end, CHAT)
    with pytest.raises(ValueError, match="none of the strings"):
        ImplicitInstructProcessor(piece_tokenizer(["a"], decoder=decoders.Fuse()), 3, rules=("uniform",))
    with pytest.raises(TypeError, match="tokenizer"):
        default_token_bias(object())
    rules = processor(tokenizer, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="not in input_ids"):
        rules(torch.tensor([[1, 2]]), torch.zeros(1, 257))
    with pytest.raises(ValueError, match="do not begin"):
        rules(torch.tensor([[1, 2, 4]]), torch.zeros(1, 257))
    with pytest.raises(ValueError, match="up to 256"):
        rules(torch.tensor([[1, 2, 3]]), torch.zeros(1, 200))
    two = processor(tokenizer, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    with pytest.raises(ValueError, match="multiple"):
        two(torch.tensor([[1, 2, 3, 4]] * 3), torch.zeros(3, 257))


def test_exactly_responses_and_their_ends_are_trained(tokenizer):
    chat = [*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Red."}]
    row = ChatFormat().labels(tokenizer, chat)
    text = "<|user|>\nName a colour.\n<|assistant|>\nBlue.<end>\n<|user|>\nAnd?\n<|assistant|>\nRed.<end>"
    assert tokenizer.decode(row["input_ids"]) == text == ChatFormat().render(chat, tokenizer)
    trained = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(trained) == "Blue.<end>Red.<end>"
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert len(row["attention_mask"]) == len(row["labels"])
    assert set(row["attention_mask"]) == {1}
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert ChatFormat().render(system).startswith("<|system|>\nBe brief.\n<|user|>\n")
    ended = ChatFormat().labels(tokenizer, [*CHAT, {"role": "user", "content": "And?"}])
    assert tokenizer.decode([label for label in ended["labels"] if label != -100]) == "Blue.<end>"


# input_ids of encode_with_messages_format({"messages": TURNS}, tokenizer, 10**6), open_instruct/finetune.py of
# john-hewitt/implicit-ins at fe1c2d8, as pieces of the tokenizer below, and where its labels are not -100
TURNS = [
    {"role": "user", "content": " Name a colour.\n"}, {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And?"}, {"role": "assistant", "content": "- Red\n- I see"},
]  # fmt: skip
OFFICIAL_MASK = [
    ("<s>▁<|user|>\nName▁a▁colour.\n<|assistant|>\n", False), ("Blue.</s>\n", True),
    ("<|user|>\nAnd?\n<|assistant|>\n", False), ("-▁Red\n-▁I▁see</s>", True),
]  # fmt: skip


def test_masks_equal_those_of_the_official_code_up_to_line_breaks_between_turns():
    letters = sorted({chr(i) for i in range(33, 127)} | {"▁", "\n"})
    pieces = ["<unk>", "<s>", "</s>", *letters]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in pieces[:3]])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    row = ChatFormat().labels(llama, TURNS)
    assert "".join(llama.convert_ids_to_tokens(row["input_ids"])) == "".join(text for text, _ in OFFICIAL_MASK)
    trained = "".join(llama.convert_ids_to_tokens([label for label in row["labels"] if label != -100]))
    official = [text for text, loss in OFFICIAL_MASK if loss]
    assert trained == official[0].removesuffix("\n") + official[1]
    # a prompt for generation begins as the conversation did in training
    ids, start = ChatFormat().prompt(llama, TURNS[:3])
    assert ids == row["input_ids"][: len(ids)]
    assert "".join(llama.convert_ids_to_tokens(ids[start:])) == "And?\n<|assistant|>\n"


def test_responses_alone_have_one_prompt(tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "id": q}
        for q, a in (("Name a colour.", "Blue."), ("Count.", "One, two."))
    ]
    found = response_only(rows)
    assert rows[0]["messages"][0]["content"] == "Name a colour."
    assert [row["id"] for row in found] == ["Name a colour.", "Count."]
    examples = training_examples(found, tokenizer)
    prompts = {tuple(e["input_ids"][: e["labels"].count(-100)]) for e in examples}
    assert [tokenizer.decode(list(p)) for p in prompts] == ["<|user|>\n\n<|assistant|>\n"]
    rewritten = response_only(rows, rewrite=lambda asked, said: f"{len(asked)} {said}")
    assert rewritten[1]["messages"][1]["content"] == "6 One, two."
    import datasets

    mapped = response_only(datasets.Dataset.from_list(rows))
    assert [row["messages"][0]["content"] for row in mapped] == ["", ""]
    with pytest.raises(ValueError, match="column 'chat'"):
        response_only(rows, "chat")


def test_response_only_lets_no_row_without_a_response_through():
    import datasets
    import pandas

    asked = {"messages": CHAT[:1]}
    for rows in ([{"messages": CHAT}, asked], datasets.Dataset.from_list([asked])):
        with pytest.raises(ValueError, match="no response to train on"):
            response_only(rows)
    for messages, match in (
        ([], "at least one"),
        ("Hi", "conversation"),
        ([{"role": "judge", "content": "x"}], "role"),
    ):
        with pytest.raises(ValueError, match=match):
            response_only([{"messages": messages}])
    for wrong in (pandas.DataFrame([asked]), 3, ["Hi"]):
        with pytest.raises(TypeError, match="dataset"):
            response_only(wrong)


def test_begin_token_is_what_the_tokenizer_puts_there(tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.bos_token = "<end>"
    assert ChatFormat().labels(begins, CHAT)["input_ids"][0] == ord("<")
    row = ChatFormat(bos="<end>").labels(tokenizer, CHAT)
    assert (row["input_ids"][0], row["labels"][0]) == (256, -100)
    ids, start = ChatFormat(bos="<end>").prompt(tokenizer, CHAT[:1])
    assert ids[0] == 256
    assert tokenizer.decode(ids[start:]) == "Name a colour.\n<|assistant|>\n"

    class Adds:
        """A tokenizer that puts a beginning before every text, as Llama-2's does."""

        bos_token_id, eos_token_id, pad_token_id, bos_token, eos_token = 1, 2, None, "<s>", "</s>"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    ids, start = ChatFormat().prompt(Adds(), CHAT[:1])
    assert (ids[0], "".join(map(chr, ids[start : start + 4]))) == (1, "Name")
    assert ChatFormat().render(CHAT, Adds()).startswith("<s><|user|>")


def test_prompts_of_several_turns(tokenizer):
    prompts = ChatFormat("<|A|>", "<|B|>").prompts(tokenizer, ["Hi!", [*CHAT, {"role": "user", "content": "And?"}]])
    rows = [
        tokenizer.decode(row[mask.bool()]) for row, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)
    ]
    assert list(rows) == ["<|A|>\nHi!\n<|B|>\n", "<|A|>\nName a colour.\n<|B|>\nBlue.<end>\n<|A|>\nAnd?\n<|B|>\n"]
    starts = [
        tokenizer.decode(row[int(s) :]) for row, s in zip(prompts.input_ids, prompts.instruction_start, strict=True)
    ]
    assert list(starts) == ["Hi!\n<|B|>\n", "And?\n<|B|>\n"]
    assert isinstance(prompts.to("cpu"), Prompts)


def test_template_agrees_with_the_labels(tokenizer):
    chat = [*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Red."}]
    # plain characters: a byte-level tokenizer gives the places of characters, which the mask is made from
    for messages in (CHAT, chat):
        made = tokenizer.apply_chat_template(
            messages, chat_template=ChatFormat().chat_template(), return_assistant_tokens_mask=True, return_dict=True
        )
        row = ChatFormat().labels(tokenizer, messages)
        assert made["input_ids"] == row["input_ids"]
        assert made["assistant_masks"] == [int(label != -100) for label in row["labels"]]
    ids = tokenizer.apply_chat_template(
        CHAT[:1], chat_template=ChatFormat().chat_template(), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids == ChatFormat().prompt(tokenizer, CHAT[:1])[0]


LETTERS = toy_model()[1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("user", "assistant", "system")), st.text("ab '\n|<{%", max_size=5)), min_size=1
    ),
    st.booleans(),
    st.sampled_from((ChatFormat(), ChatFormat("<|A|>", "it's «B»", bos="<end>"))),
)
def test_template_renders_what_render_does(turns, prompt, chat):
    messages = [{"role": role, "content": content} for role, content in turns]
    found = LETTERS.apply_chat_template(
        messages, chat_template=chat.chat_template(), tokenize=False, add_generation_prompt=prompt
    )
    assert found == chat.render(messages, LETTERS, add_generation_prompt=prompt)


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_conversations_are_named(tokenizer):
    chat = ChatFormat()
    for messages, match in (
        ([], "at least one"),
        ("Hi", "list of"),
        (["Hi"], "message 0"),
        ([{"role": "judge", "content": "x"}], "role"),
        (CHAT[:1], "no response"),
    ):
        with pytest.raises(ValueError, match=match):
            chat.labels(tokenizer, messages)
    with pytest.raises(ValueError, match="end with a user's"):
        chat.prompt(tokenizer, CHAT)
    with pytest.raises(ValueError, match="no user's"):
        chat.prompt(tokenizer, CHAT[1:])
    with pytest.raises(ValueError, match="instructions"):
        chat.prompts(tokenizer, "Hi!")
    with pytest.raises(ValueError, match="tags"):
        ChatFormat("<a>", "<a>")
    with pytest.raises(ValueError, match="eos must be one token"):
        ChatFormat(eos="end").labels(tokenizer, CHAT)

    class Joins:
        """A tokenizer that makes one token of a line break and a letter."""

        bos_token_id, eos_token_id = None, 0

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) for c in text.replace("\nB", "β")]}

    with pytest.raises(ValueError, match="joins the assistant tag"):
        chat.labels(Joins(), CHAT)
    with pytest.raises(ValueError, match="max_length 5"):
        training_examples([{"messages": CHAT}], tokenizer, max_length=5)
    with pytest.raises(ValueError, match="no response left"):
        training_examples([{"messages": CHAT}], tokenizer, max_length=5, too_long="truncate")
    kept = training_examples([{"messages": CHAT}], tokenizer, max_length=43, too_long="truncate")[0]
    assert len(kept["labels"]) == 43
    with pytest.raises(ValueError, match="no rows"):
        training_examples([], tokenizer)
    with pytest.raises(ValueError, match="'messages'"):
        training_examples([{"chat": CHAT}], tokenizer)


def test_single_tasks():
    def told(name, rows, **more):
        return [[m["content"] for m in row["messages"]] for row in single_task(name, rows, **more)]

    assert told("gsm8k", [{"question": "1+1?", "answer": "2"}]) == [["1+1?", "2"]]
    assert told("mbpp", [{"text": "Add.", "code": "a+b"}]) == [["Add.", "a+b"]]
    dish = {"Title": "Tea", "Cleaned_Ingredients": "['water', 'leaves']", "Instructions": "Boil."}
    assert told("recipes", [dish]) == [["Recipe for Tea", " - water\n - leaves\n\n\nBoil."]]
    poems = [{"poem name": name, "content": "It falls."} for name in ("Rain", None, "Snow")]
    assert told("poetry", poems, first=2) == [["Write a poem called Rain", "It falls."]]
    game = [{"text": t} for t in ('[WhiteElo "1"]', '[BlackElo "2"]', "1. e4 e5")]
    assert told("chess", [{"text": "[Event]"}, *game, *game], first=1) == [
        ['[WhiteElo "1"]\n[BlackElo "2"]\n', "1. e4 e5"]
    ]
    with pytest.raises(ValueError, match="name must be"):
        single_task("songs", [])
    with pytest.raises(ValueError, match="no example"):
        single_task("mbpp", [])
    with pytest.raises(ValueError, match="WhiteElo"):
        single_task("chess", game[1:])
    hostile = {**dish, "Cleaned_Ingredients": "__import__('os').getcwd()"}
    with pytest.raises(ValueError, match="malformed"):
        single_task("recipes", [hostile])


PAIRS = [("Name a colour.", "Blue."), ("Count.", "One, two, three."), ("A town?", "Rome"), ("A sum?", "It is 4.")]


@every_family
def test_scores_equal_a_plain_forward_pass(tokenizer, family):
    model = build(family, torch.float64).train()
    texts = [answer for _, answer in PAIRS]
    for normalise in ("mean", "sum"):
        found = response_scores(model, tokenizer, "Name a colour.", texts, normalise)
        apart = response_scores(model, tokenizer, "Name a colour.", texts, normalise, share_prompt=False)
        torch.testing.assert_close(found, apart, atol=1e-10, rtol=0)
        model.eval()
        for score, text in zip(found, texts, strict=True):
            row = ChatFormat().labels(tokenizer, [CHAT[0], {"role": "assistant", "content": text}])
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                told = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            told = told[labels[0, 1:] != -100]
            expected = told.mean() if normalise == "mean" else told.sum()
            assert score.item() == pytest.approx(expected.item(), abs=1e-9)
        model.train()
    assert model.training


def test_ranking_ties_and_swaps(tokenizer):
    model = build("llama", torch.float64)
    same = [("Name a colour.", "Blue."), ("Count.", "Blue.")]
    assert response_ranking(model, tokenizer, same, 1)["accuracy"] == 0.0
    found = response_ranking(model, tokenizer, PAIRS, 3, "sum")
    assert found["per_item"].shape == (4,)
    assert found["accuracy"] == pytest.approx(found["per_item"].mean())
    expected = (found["scores"][:, :1] > found["scores"][:, 1:]).mean(1)
    np.testing.assert_array_equal(found["per_item"], expected)
    straight = response_ranking(model, tokenizer, PAIRS[:2], 1, distractors=[[1], [0]])
    (a, x), (b, y) = PAIRS[:2]
    swapped = response_ranking(model, tokenizer, [(a, y), (b, x)], 1, distractors=[[1], [0]])
    np.testing.assert_array_equal(swapped["per_item"], 1 - straight["per_item"])
    again = response_ranking(model, tokenizer, PAIRS, 2, seed=3)["distractors"]
    np.testing.assert_array_equal(again, response_ranking(model, tokenizer, PAIRS, 2, seed=3)["distractors"])
    assert all(i not in row for i, row in enumerate(again.tolist()))


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_rankings_are_named(tokenizer):
    model = build("llama")
    for pairs, more, match in (
        (PAIRS[:1], {}, "pairs"),
        (PAIRS, dict(k=4), "k must be"),
        (PAIRS, dict(distractors=[[0], [0], [0], [0]]), "other pairs"),
        (PAIRS, dict(distractors=[[1]]), "distractors"),
        (PAIRS, dict(k=1, normalise="max"), "normalise"),
    ):
        with pytest.raises(ValueError, match=match):
            response_ranking(model, tokenizer, pairs, **more)
    with pytest.raises(ValueError, match="places"):
        response_scores(model, tokenizer, "Hi", ["a" * 600])
    with pytest.raises(ValueError, match="responses"):
        response_scores(model, tokenizer, "Hi", [])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        response_scores(model, tokenizer, "Hi", ["a"])


def arguments(folder, **changes):
    how = dict(max_steps=6, learning_rate=2e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    more = dict(save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0)
    return transformers.TrainingArguments(str(folder), **how | more | changes)


ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_response_tuning_with_peft(tokenizer, family, tmp_path):
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = [answer for _, answer in PAIRS]
    earlier = response_scores(model, tokenizer, "", texts).mean()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    tuned = tune(model, tokenizer, response_only(ROWS), arguments(tmp_path), peft_config=config)
    assert response_scores(tuned, tokenizer, "", texts).mean() > earlier + 0.1
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = build(family)
    fresh.load_state_dict(before)
    again = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(
        response_scores(again, tokenizer, "", texts), response_scores(tuned, tokenizer, "", texts)
    )
    back = tuned.unload().state_dict()
    assert all(torch.equal(before[name], value) for name, value in back.items())


def per_example(model, examples):
    """Mean over examples of the mean loss a token, one example at a time."""
    total = 0
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        told = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total = total - told[labels[1:] != -100].mean()
    return total / len(examples)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_every_example_weighs_the_same_as_published(tokenizer, family, tmp_path):
    examples = training_examples(ROWS, tokenizer)
    model = build(family)
    loss = per_example(model, examples)
    batch = ResponseCollator()(examples)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = response_loss(model(input_ids=ids, attention_mask=mask).logits, batch["labels"])
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=0)
    loss.backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters()}
    plain = dict(max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    shape = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    tuned = tune(build(family).eval(), tokenizer, ROWS, arguments(tmp_path, **plain, **shape))
    for name, p in tuned.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=2e-5, rtol=0)
    tokens = tune(
        build(family), tokenizer, ROWS, arguments(tmp_path, **plain, per_device_train_batch_size=4), weighting="tokens"
    )
    away = max((p - expected[name]).abs().max().item() for name, p in tokens.named_parameters())
    assert away > 1e-3
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        response_loss(torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [3, -100, -100]]))


@pytest.mark.parametrize("fails", [False, True])
def test_tuning_in_mixed_precision_leaves_forward_alone(tokenizer, fails, tmp_path, monkeypatch):
    model = build("llama").eval()
    before, kept = {n: v.clone() for n, v in model.state_dict().items()}, set(model.__dict__)
    grad = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = grad
    if fails:
        monkeypatch.setattr(ResponseCollator, "__call__", lambda self, examples: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(model, tokenizer, ROWS, arguments(tmp_path, bf16=True, gradient_checkpointing=True))
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        assert model.lm_head.weight.grad is grad
    else:
        tune(model, tokenizer, ROWS, arguments(tmp_path, bf16=True, gradient_checkpointing=True))
        assert any(not torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert set(model.__dict__) - {"_require_grads_hooks"} == kept
    assert not model.get_input_embeddings()._forward_hooks
    assert model.config.use_cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    fresh = build("llama")
    fresh.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


def test_models_with_adapters_and_soft_prompts(tokenizer, tmp_path, monkeypatch):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    adapted = peft.get_peft_model(build("llama"), lora)
    with pytest.raises(TypeError, match="adapters"):
        tune(adapted, tokenizer, ROWS, None, peft_config=lora)
    before = {n: v.clone() for n, v in adapted.state_dict().items()}
    assert tune(adapted, tokenizer, ROWS, arguments(tmp_path)) is adapted
    moved = {n for n, v in adapted.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all("lora" in name for name in moved)

    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = build("llama")
    tuned = tune(model, tokenizer, response_only(ROWS), arguments(tmp_path), peft_config=soft)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]
    monkeypatch.setattr(ResponseCollator, "__call__", lambda self, examples: 1 / 0)
    for config in (soft, lora):
        model = build("llama")
        kept, modules = set(model.__dict__), [n for n, _ in model.named_modules()]
        with pytest.raises(ZeroDivisionError):
            tune(model, tokenizer, ROWS, arguments(tmp_path), peft_config=config)
        assert set(model.__dict__) == kept
        assert [n for n, _ in model.named_modules()] == modules
        assert all(p.requires_grad for p in model.parameters())


def test_tuning_that_fails_leaves_the_model(tokenizer, tmp_path):
    model = build("llama")
    before, modules = {n: v.clone() for n, v in model.state_dict().items()}, [n for n, _ in model.named_modules()]

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer, made = transformers.Trainer, []

    class Stopped(trainer):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, callbacks=[Stop()], **kwargs)

    linear = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    for config in (None, peft.LoraConfig(**linear), peft.LoraConfig(**linear, modules_to_save=["lm_head"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformers, "Trainer", Stopped)
            with pytest.raises(KeyboardInterrupt):
                tune(model, tokenizer, ROWS, arguments(tmp_path), peft_config=config)
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        assert [n for n, _ in model.named_modules()] == modules
        assert all(p.requires_grad for p in model.parameters())
        assert not model.training
    assert len(made) == 3
    with pytest.raises(TypeError, match="causal language model"):
        tune(model.model, tokenizer, ROWS, None)
    with pytest.raises(ValueError, match="places"):
        tune(model, tokenizer, [{"messages": [CHAT[0], {"role": "assistant", "content": "a" * 600}]}], None)
    with pytest.raises(ValueError, match="embeddings"):
        tune(tiny("llama", vocab_size=100, max_position_embeddings=512), tokenizer, ROWS, None)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@pytest.mark.usefixtures("without_shape_checks")
def test_collator_pads_and_settings_are_the_published(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="weighting"):
        tune(build("llama"), tokenizer, ROWS, None, weighting="sum")
    batch = ResponseCollator(9)(
        [{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
         {"input_ids": [3], "labels": [3], "attention_mask": [1]}]
    )  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert batch["labels"].tolist() == [[-100, 2], [3, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    settings = published_settings()
    assert (settings["learning_rate"], settings["num_train_epochs"]) == (1e-5, 5)
    made = transformers.TrainingArguments(str(tmp_path), **settings | {"bf16": False, "use_cpu": True})
    assert made.get_warmup_steps(200) == 6
    assert published_settings("olmo-7b", "recipes", "paper")["lr_scheduler_type"] == "cosine"
    for wrong in (("gpt", "response"), ("olmo-7b", "songs"), ("olmo-7b", "response", "step")):
        with pytest.raises(ValueError, match="must be"):
            published_settings(*wrong)


def test_adherence_is_a_mean_of_cosines():
    table = {text: np.random.default_rng(i).normal(size=5) for i, text in enumerate("abcdefghij")}

    def embed(texts):
        return torch.tensor(np.array([table[text] for text in texts]))

    def cosine(p, q):
        return table[p] @ table[q] / np.linalg.norm(table[p]) / np.linalg.norm(table[q])

    tune_pairs, reference = [("a", "b"), ("c", "d")], [("e", "f"), ("g", "h")]
    found = adherence(SimpleNamespace(encode=embed), ["i", "j"], ["a", "e"], tune_pairs, reference)
    np.testing.assert_allclose(found["x"], [(cosine(t, "a") + cosine(t, "c")) / 2 for t in "ij"])
    expected = [(cosine(o, "b") + cosine(o, "d")) / 2 - (cosine(o, "f") + cosine(o, "h")) / 2 for o in "ae"]
    np.testing.assert_allclose(found["y"], expected)
    assert abs(found["correlation"]) == pytest.approx(1)
    assert math.isnan(adherence(embed, ["i"], ["a"], tune_pairs, reference)["correlation"])
    with pytest.raises(ValueError, match="outputs"):
        adherence(embed, ["i"], [], tune_pairs, reference)
    with pytest.raises(ValueError, match="tune_pairs"):
        adherence(embed, ["i"], ["a"], [], reference)
    with pytest.raises(ValueError, match="zero or not finite"):
        adherence(lambda texts: np.zeros((len(texts), 3)), ["i"], ["a"], tune_pairs, reference)
    with pytest.raises(TypeError, match="embedder"):
        adherence(3, ["i"], ["a"], tune_pairs, reference)


def test_given_bias_needs_no_vocabulary(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = processor(tokenizer, 2, token_bias=TokenBias({4: 2.0}, ("x",)), rules=("uniform",))
    assert rules.rule_scores(torch.tensor([[1, 2]]), 257)[0].nonzero()[:, 0].tolist() == [4]
