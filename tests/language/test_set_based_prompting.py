import itertools
import math
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

from torchgraft.language import set_based_prompting as sbp
from torchgraft.language.set_based_prompting import (
    MASK_ONLY,
    PADDED,
    PLAIN,
    POSITIONS_ONLY,
    SET_BASED,
    Editing,
    ElementStore,
    Set,
    SetPrompt,
    encode,
    forward,
    generate,
    option_perplexity,
    ordinary_orders,
    score_options,
)

CHARACTERS = "abcdefghijkl ?.-"
PAD, END = 16, 17
TINY = dict(vocab_size=18, bos_token_id=17, eos_token_id=17, pad_token_id=16)
DECODER = TINY | dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(**TINY, n_positions=64, n_embd=16, n_layer=2, n_head=2),
    "llama": lambda: transformers.LlamaConfig(**DECODER, num_key_value_heads=1),
    "mistral": lambda: transformers.MistralConfig(**DECODER, num_key_value_heads=1),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, num_key_value_heads=2, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**DECODER, num_key_value_heads=2),
}
PROMPT = SetPrompt(["abc? ", Set(["-dab.", "-e.", "-fgh."]), " k? "])
TWO_SETS = SetPrompt(["ab", Set(["cd", "e"]), "f", Set(["g", "hij", "kl"]), "? "])
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family, dtype=torch.float32, attention="sdpa", seed=0, **changes):
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.4)
    model.generation_config.eos_token_id = None  # so that twenty steps are twenty steps
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def character_tokenizer(front=False):
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<pad>", "<end>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    if front:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single=front, special_tokens=[("<end>", END)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def all_orders(prompt):
    sizes = [range(len(s.elements)) for s in prompt.sets]
    return [prompt.permuted(*orders) for orders in itertools.product(*map(itertools.permutations, sizes))]


@torch.no_grad()
def suffix_logits(model, tokenizer, prompts, editing=SET_BASED):
    """Logits of every suffix token, [prompts, tokens of the suffix, vocabulary]."""
    batch = encode(tokenizer, prompts, editing=editing, dtype=model.dtype)
    return forward(model, batch).logits[:, -len(prompts[0].parts[-1]) :]


def change(logits):
    return float((logits - logits[:1]).abs().max())


# order invariance


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_the_suffix_do_not_depend_on_the_order(family, attention, tokenizer):
    model = build(family, attention=attention)
    prompts = all_orders(SetPrompt(["abc? ", Set(["-dab.", "-e.", "-fgh.", "ii"]), " k? "]))
    assert len(prompts) == 24
    assert change(suffix_logits(model, tokenizer, prompts)) <= 1e-5
    for ablation in (PLAIN, MASK_ONLY, POSITIONS_ONLY):
        assert change(suffix_logits(model, tokenizer, prompts, ablation)) > 1e-2, f"{ablation} should not be invariant"


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama"])
def test_invariance_in_float64(family, tokenizer, monkeypatch):
    if family == "llama":
        # Llama's norm rounds to float32 whatever the dtype; this is its formula in the dtype of the model
        norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
        monkeypatch.setattr(
            norm,
            "forward",
            lambda self, x: self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon),
        )
    model = build(family, torch.float64)
    for prompt in (PROMPT, TWO_SETS):
        assert change(suffix_logits(model, tokenizer, all_orders(prompt))) <= 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sets_are_permuted_independently(family, tokenizer):
    prompts = all_orders(TWO_SETS)
    assert len(prompts) == 12
    assert change(suffix_logits(build(family), tokenizer, prompts)) <= 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_twenty_greedy_tokens_are_the_same_for_every_order(family, tokenizer):
    model = build(family)
    ids = generate(model, tokenizer, all_orders(PROMPT), max_new_tokens=20, return_tensors="pt")
    assert ids.shape == (6, 20)
    assert (ids == ids[:1]).all()
    assert len(ids[0].unique()) > 2, "a constant continuation would prove nothing"
    plain = generate(model, tokenizer, all_orders(PROMPT), max_new_tokens=20, return_tensors="pt", editing=PLAIN)
    assert not (plain == plain[:1]).all()


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=3),
        dict(num_beams=3, num_return_sequences=2),
        dict(do_sample=True, top_k=0),
        dict(do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=3),
        dict(repetition_penalty=1.3),
    ],
    ids=str,
)
def test_beams_samples_and_processors_do_not_depend_on_the_order(how, model, tokenizer):
    found = []
    for prompt in all_orders(PROMPT):
        torch.manual_seed(5)
        found.append(generate(model, tokenizer, [prompt], max_new_tokens=12, return_tensors="pt", **how))
    assert found[0].shape == (how.get("num_return_sequences", 1), 12)
    assert all(torch.equal(ids, found[0]) for ids in found)


def test_canonical_order_is_equal_to_the_last_bit(model, tokenizer):
    logits = suffix_logits(model, tokenizer, all_orders(PROMPT), Editing(canonical=True))
    assert (logits == logits[:1]).all()
    torch.testing.assert_close(logits, suffix_logits(model, tokenizer, all_orders(PROMPT)), atol=1e-5, rtol=0)


def test_duplicated_elements_all_count(model, tokenizer):
    once, twice = (SetPrompt(["ab", Set(e), "? "]) for e in (["cd", "e"], ["cd", "cd", "e"]))
    assert change(suffix_logits(model, tokenizer, all_orders(twice))) <= 1e-5
    difference = suffix_logits(model, tokenizer, [once]) - suffix_logits(model, tokenizer, [twice])
    assert difference.abs().max() > 1e-3


# what an element sees


@every_family
def test_an_element_computes_what_it_would_alone_after_the_prefix(family, tokenizer):
    model = build(family)
    batch = encode(tokenizer, [PROMPT])
    with torch.no_grad():
        hidden = forward(model, batch, output_hidden_states=True).hidden_states[-1][0]
        for number, element in enumerate(PROMPT.sets[0].elements, start=1):
            ids = torch.tensor([[CHARACTERS.index(c) for c in "abc? " + element]])
            alone = model(ids, output_hidden_states=True).hidden_states[-1][0]
            mine = hidden[(batch["element_ids"][0] == number)]
            torch.testing.assert_close(mine, alone[-len(element) :], atol=1e-5, rtol=0)


@every_family
def test_one_element_is_the_plain_prompt(family, tokenizer):
    model = build(family)
    prompt = SetPrompt(["abc? ", Set(["-dab."]), " k? "])
    edited, plain = (encode(tokenizer, [prompt], editing=e) for e in (SET_BASED, PLAIN))
    assert all(torch.equal(edited[name], plain[name]) for name in ("input_ids", "position_ids", "attention_mask"))
    with torch.no_grad():
        usual = model(torch.tensor([[CHARACTERS.index(c) for c in prompt.text]])).logits
        torch.testing.assert_close(forward(model, edited).logits, usual, atol=1e-5, rtol=0)
        assert torch.equal(forward(model, edited).logits, forward(model, plain).logits)


# cache and batches


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("editing", [SET_BASED, PADDED, MASK_ONLY, POSITIONS_ONLY, PLAIN], ids=str)
def test_cached_generation_is_full_computation_at_every_step(family, editing, tokenizer):
    model = build(family)
    prompts = [PROMPT, TWO_SETS]
    out = generate(
        model, tokenizer, prompts, editing=editing, max_new_tokens=6, return_dict_in_generate=True, output_logits=True
    )
    for row, prompt in enumerate(prompts):
        written = ""
        for step, logits in enumerate(out.logits):
            longer = SetPrompt([*prompt.parts, written])
            expected = suffix_logits(model, tokenizer, [longer], editing)[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=0)
            token = int(out.sequences[row, step - 6])
            if token >= len(CHARACTERS):
                break  # a special token cannot be written as text
            written += CHARACTERS[token]


@every_family
def test_a_left_padded_batch_is_the_same_as_one_by_one(family, tokenizer):
    model = build(family)
    prompts = [PROMPT, TWO_SETS, SetPrompt([Set(["a", "b"]), "c"])]
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts]
    batch = encode(tokenizer, prompts)
    with torch.no_grad():
        logits = forward(model, batch).logits
        for row, prompt in enumerate(prompts):
            alone = forward(model, encode(tokenizer, [prompt])).logits[0]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-5, rtol=0)
        right = encode(tokenizer, prompts, padding_side="right")
        expected = logits[1, -len(TWO_SETS.text) :]
        torch.testing.assert_close(forward(model, right).logits[1, : len(TWO_SETS.text)], expected, atol=1e-5, rtol=0)


def test_padded_elements_give_the_same_and_positions_are_then_flat(model, tokenizer):
    prompts = all_orders(PROMPT)
    padded = suffix_logits(model, tokenizer, prompts, PADDED)
    torch.testing.assert_close(padded, suffix_logits(model, tokenizer, prompts), atol=1e-5, rtol=0)
    assert encode(tokenizer, [PROMPT], editing=PADDED)["input_ids"].shape[1] == 5 + 3 * 5 + 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("front", [False, "<end> $0"])
def test_elements_computed_as_a_batch_and_kept_give_the_same(family, front):
    model, tokenizer = build(family), character_tokenizer(front)
    store = ElementStore(model)
    prompts = [
        PROMPT,
        TWO_SETS,
        SetPrompt([Set(["a", "bbb", "a"]), "c"]),
        SetPrompt([Set(["a", "b"]), Set(["c"]), "d"]),
    ]
    kwargs = dict(max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    for again in range(2):
        for some in (prompts, [p.permuted(*[range(len(s.elements))[::-1] for s in p.sets]) for p in prompts]):
            flat = generate(model, tokenizer, some, **kwargs)
            kept = generate(model, tokenizer, some, store=store, **kwargs)
            assert torch.equal(flat.sequences, kept.sequences)
            torch.testing.assert_close(torch.stack(kept.logits), torch.stack(flat.logits), atol=2e-5, rtol=0)
        if not again:
            misses = store.misses
    assert misses == store.misses == len(store)
    assert store.hits > 0
    store.clear()
    assert len(store) == 0


def test_the_model_is_untouched_after_success_and_after_an_exception(model, tokenizer):
    def state():
        attributes = {name: id(value) for name, value in vars(model).items() if not name.startswith("_is_")}
        return attributes, len(model._forward_pre_hooks), len(model._forward_hooks), model.generation_config.to_dict()

    before = state()
    usual = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    generate(model, tokenizer, [PROMPT], max_new_tokens=3, num_beams=2)

    class Stop(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("stop")

    with pytest.raises(KeyError):
        generate(
            model, tokenizer, [PROMPT], max_new_tokens=3, logits_processor=transformers.LogitsProcessorList([Stop()])
        )
    assert state() == before
    again = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    assert torch.equal(usual, again)


def test_stopping_is_that_of_transformers(model, tokenizer):
    ids = generate(model, tokenizer, [PROMPT], max_new_tokens=12, return_tensors="pt")[0].tolist()
    assert generate(model, tokenizer, [PROMPT], max_new_tokens=12) == [tokenizer.decode(ids, skip_special_tokens=True)]
    stop = next(token for token in ids if token < len(CHARACTERS) and token != ids[0])
    cut = generate(model, tokenizer, [PROMPT], max_new_tokens=12, stop_strings=[CHARACTERS[stop]], return_tensors="pt")
    assert cut[0].tolist() == ids[: ids.index(stop) + 1]
    end = generate(model, tokenizer, [PROMPT], max_new_tokens=12, eos_token_id=stop, return_tensors="pt")
    assert end[0].tolist() == ids[: ids.index(stop) + 1]


# mask and positions


def naive_mask(set_ids, element_ids):
    n = len(set_ids)
    allowed = [[False] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if j > i or (set_ids[j] == -1 and i != j):
                continue
            in_same_set = set_ids[i] > 0 and set_ids[i] == set_ids[j]
            allowed[i][j] = not in_same_set or element_ids[i] == element_ids[j]
    return allowed


LAYOUTS = [[2, (2, 1), 1, (1, 3, 2), 2], [(1, 1), (2, 3), 1], [3, (4,), 2], [1, (1, 2, 3, 4), 1]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mask_equals_a_double_loop(layout):
    set_ids, element_ids = sbp.set_labels(layout)
    padded = F.pad(set_ids, (2, 0), value=-1), F.pad(element_ids, (2, 0))
    for sets, elements in ((set_ids, element_ids), padded):
        found = sbp.set_attention_mask(sets[None], elements[None])[0]
        assert found.tolist() == naive_mask(sets.tolist(), elements.tolist())
        block = sbp.set_block_mask(sets[None], elements[None], block_size=16)
        n = len(sets)
        i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        assert torch.equal(block.mask_mod(torch.tensor(0), torch.tensor(0), i, j), found)


def test_positions_of_the_card():
    found = sbp.set_positions([2, (2, 1), 1, (1, 3, 2), 2]).tolist()
    assert found == [0, 1, 2, 3, 2, 4, 5, 5, 6, 7, 5, 6, 8, 9]


def test_block_mask_skips_what_lies_between_elements():
    # in a process without the shape checker, whose wrapper FlexAttention cannot trace
    code = """
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torchgraft.language import set_based_prompting as sbp

set_ids, element_ids = sbp.set_labels([64, (64,) * 8, 64])
block = sbp.set_block_mask(set_ids[None], element_ids[None], block_size=64)
blocks = int(block.kv_num_blocks.sum()) + int(block.full_kv_num_blocks.sum())
assert blocks == 1 + 8 * 2 + 10, blocks  # of 55 under the causal mask
q, k, v = torch.randn(3, 1, 2, 640, 8, generator=torch.Generator().manual_seed(0))
mask = sbp.set_attention_mask(set_ids[None], element_ids[None])[:, None]
expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
torch.testing.assert_close(flex_attention(q, k, v, block_mask=block), expected, atol=1e-5, rtol=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_mask_sent_is_additive_in_the_dtype_of_the_model(tokenizer):
    batch = encode(tokenizer, [PROMPT, TWO_SETS], dtype=torch.bfloat16)
    assert batch["attention_mask"].shape == (2, 1, 22, 22)
    assert batch["attention_mask"].dtype == torch.bfloat16
    assert set(batch["attention_mask"].unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}
    assert (encode(tokenizer, [PROMPT], return_tensors="np")["input_ids"] == batch["input_ids"][:1].numpy()).all()


def test_a_bool_mask_would_be_wrong_with_eager_attention(tokenizer):
    """The fact of transformers 5 that makes `encode` send an additive one."""
    model = build("llama", attention="eager")
    batch = encode(tokenizer, [PROMPT])
    allowed = batch["attention_mask"] == 0
    wrong = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=allowed).logits
    right = forward(model, batch).logits
    assert (wrong - right).abs().max() > 1e-2


# parity with reidmcy/set-based-prompting at ea5b13cbc37e01501af63dcb843b537783db51d5 (transformers 4.37.2), which ran
# get_position_ids_nopad_n_options, get_position_ids_padded_n_options, get_attention_mask_2d_n_options, their
# _recursive forms and order_independent_query on the prompts and weights below


def words(text):
    return text.split()


OFFICIAL_MASK = words("""
1000000000000000000000 1100000000000000000000 1110000000000000000000 1111000000000000000000 1111100000000000000000
1111110000000000000000 1111111000000000000000 1111111100000000000000 1111111110000000000000 1111111111000000000000
1111100000100000000000 1111100000110000000000 1111100000111000000000 1111100000000100000000 1111100000000110000000
1111100000000111000000 1111100000000111100000 1111100000000111110000 1111111111111111111000 1111111111111111111100
1111111111111111111110 1111111111111111111111
""")
OFFICIAL_PADDED_MASK = words("""
100000000000000000000000 110000000000000000000000 111000000000000000000000 111100000000000000000000
111110000000000000000000 111111000000000000000000 111111100000000000000000 111111110000000000000000
111111111000000000000000 111111111100000000000000 111110000010000000000000 111110000011000000000000
111110000011100000000000 111110000011100000000000 111110000011100000000000 111110000000000100000000
111110000000000110000000 111110000000000111000000 111110000000000111100000 111110000000000111110000
111111111111100111111000 111111111111100111111100 111111111111100111111110 111111111111100111111111
""")
OFFICIAL_RECURSIVE_MASK = words("""
10000000000000 11000000000000 11100000000000 11110000000000 11001000000000 11111100000000 11111110000000
11111101000000 11111101100000 11111101110000 11111100001000 11111100001100 11111111111110 11111111111111
""")
# logits of the first new token, greedy continuation of 8 tokens, label_scores of "dab", "e", "fgh"
OFFICIAL = {
    ("gpt2", SET_BASED): (
        [1.1184056, -4.8249803, -7.3500199, -4.6678014, 1.3214085, 6.3744421, 6.9113832, 2.5518272, -3.6156182,
         -7.2215123, -5.7111912, -0.154671, 5.5114279, 7.2728543, 3.8816917, -2.2595279, -6.7999425, -6.5228109],
        None, None,
    ),
    ("gpt2", MASK_ONLY): (
        [0.8905482, -4.9815617, -7.3243918, -4.4781203, 1.5407587, 6.4680591, 6.8129425, 2.3310709, -3.8022914,
         -7.2418489, -5.5507841, 0.0728364, 5.644855, 7.2176714, 3.6769946, -2.4687178, -6.8654213, -6.3981895],
        [13, 16, 9, 16, 16, 13, 13, 13], [0.8258405327796936, 1.540758728981018, 0.5401102900505066],
    ),
    ("gpt2", PLAIN): (
        [0.9214897, -4.9606605, -7.3283377, -4.5041189, 1.511127, 6.4557877, 6.8267245, 2.3611429, -3.7772348,
         -7.2395611, -5.5728846, 0.0420045, 5.6271348, 7.2256169, 3.704977, -2.4405234, -6.8569889, -6.4154935],
        [13, 16, 9, 16, 16, 13, 13, 13], [0.832203209400177, 1.51112699508667, 0.5530828237533569],
    ),
    ("llama", SET_BASED): (
        [-0.2659553, -2.6085644, -3.1030879, -1.3991706, 1.2960145, 3.073014, 2.6728797, 0.3790942, -2.1832676,
         -3.1988533, -1.9481515, 0.682754, 2.8299499, 2.9722152, 1.0087595, -1.6693708, -3.1648045, -2.4180734],
        [5, 13, 14, 0, 15, 15, 8, 1], [-0.1407814770936966, 1.2960145473480225, 3.145886182785034],
    ),
    ("llama", MASK_ONLY): (
        [-0.1826914, -2.5651138, -3.1302338, -1.4776815, 1.2217617, 3.055625, 2.724674, 0.4633772, -2.1262078,
         -3.2094417, -2.0188866, 0.601986, 2.7963703, 3.0096145, 1.0906413, -1.6010172, -3.1584053, -2.4781623],
        [5, 13, 14, 7, 0, 15, 8, 8], [-0.15546460449695587, 1.221761703491211, 3.155210494995117],
    ),
    ("llama", POSITIONS_ONLY): (
        [-0.27081, -2.5933077, -3.0785282, -1.3827083, 1.292717, 3.0522928, 2.6494153, 0.3695104, -2.1721809,
         -3.1749506, -1.9283675, 0.6844037, 2.8122959, 2.9477649, 0.9948353, -1.6629041, -3.1425283, -2.3957696],
        [5, 13, 14, 0, 15, 15, 8, 1], [-0.1344713717699051, 1.2927169799804688, 3.1361706256866455],
    ),
    ("llama", PLAIN): (
        [-0.2419444, -2.5853484, -3.0971138, -1.4146717, 1.2700208, 3.0549436, 2.675535, 0.4005939, -2.1581554,
         -3.1879196, -1.9591428, 0.6576251, 2.8084862, 2.9696231, 1.0268755, -1.6433812, -3.149354, -2.4241083],
        [5, 13, 14, 7, 0, 15, 8, 8], [-0.19378145039081573, 1.270020842552185, 3.118647813796997],
    ),
}  # fmt: skip


def test_parity_of_mask_and_positions_with_the_official_functions(tokenizer):
    def rows(batch):
        return ["".join(str(int(v)) for v in row) for row in (batch["attention_mask"][0, 0] == 0).tolist()]

    batch = encode(tokenizer, [PROMPT])
    positions = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert batch["position_ids"][0].tolist() == positions
    assert rows(batch) == OFFICIAL_MASK
    two = encode(tokenizer, [TWO_SETS])
    assert two["position_ids"][0].tolist() == [0, 1, 2, 3, 2, 4, 5, 5, 6, 7, 5, 6, 8, 9]
    assert rows(two) == OFFICIAL_RECURSIVE_MASK

    padded = encode(tokenizer, [PROMPT], editing=PADDED)
    assert padded["position_ids"][0].tolist() == [
        *range(5),
        *range(5, 10),
        *range(5, 10),
        *range(5, 10),
        *range(10, 14),
    ]
    ids = [0, 1, 2, 13, 12, 15, 3, 0, 1, 14, 15, 4, 14, 16, 16, 15, 5, 6, 7, 14, 12, 10, 13, 12]
    assert padded["input_ids"][0].tolist() == ids
    ours, theirs = (
        [row for row, i in zip(m, ids, strict=True) if i != PAD] for m in (rows(padded), OFFICIAL_PADDED_MASK)
    )
    assert ours == theirs


def by_formula(family):
    """The weights that the official code ran with, in both versions of transformers."""
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            n = torch.arange(p.numel(), dtype=torch.float64)
            v = torch.sin(n * 0.7311 + sum(map(ord, name)) * 0.113)
            p.copy_((float("weight" in name) + 0.1 * v if p.ndim == 1 else 0.6 * v).view(p.shape))
    return model.eval()


@pytest.mark.parametrize(("family", "editing"), OFFICIAL, ids=str)
def test_parity_with_the_official_generation_and_scoring(family, editing, tokenizer):
    model = by_formula(family)
    logits, continuation, scores = OFFICIAL[family, editing]
    found = suffix_logits(model, tokenizer, [PROMPT], editing)[0, -1]
    torch.testing.assert_close(found, torch.tensor(logits), atol=1e-5, rtol=0)
    if continuation is None:
        return  # the official GPT-2 path leaves the logical positions after the first token
    ids = generate(model, tokenizer, [PROMPT], editing=editing, max_new_tokens=8, return_tensors="pt")
    assert ids[0].tolist() == continuation
    found = score_options(model, tokenizer, [PROMPT], ["dab", "e", "fgh"], "mean_logit", editing=editing)
    torch.testing.assert_close(found[0], torch.tensor(scores), atol=1e-5, rtol=0)


# scoring


@torch.no_grad()
def continued(model, tokenizer, prompt, option, editing=SET_BASED):
    """Log-probabilities of the option's tokens by the definition, one pass per option."""
    whole = SetPrompt([*prompt.parts, option])
    logits = forward(model, encode(tokenizer, [whole], editing=editing)).logits[0].log_softmax(-1)
    ids = [CHARACTERS.index(c) for c in option]
    return [float(logits[-len(ids) - 1 + t, token]) for t, token in enumerate(ids)]


@every_family
def test_options_in_one_pass_equal_one_pass_each(family, tokenizer):
    model = build(family)
    prompts, options = [PROMPT, TWO_SETS], [["dab", "e", "fgh", "e"], ["cd", "kl"]]
    for editing in (SET_BASED, PLAIN, MASK_ONLY, PADDED):
        found = score_options(model, tokenizer, prompts, options, "logprob", editing=editing)
        perplexity = option_perplexity(model, tokenizer, prompts, options, editing=editing)
        assert found.shape == (2, 4)
        assert found[1, 2:].tolist() == [-math.inf] * 2
        assert perplexity[1, 2:].tolist() == [math.inf] * 2
        assert found[0, 1] == found[0, 3]
        for row, prompt in enumerate(prompts):
            for column, option in enumerate(options[row]):
                expected = continued(model, tokenizer, prompt, option, editing)
                assert float(found[row, column]) == pytest.approx(sum(expected), abs=2e-5)
                mean = math.exp(-sum(expected) / len(expected))
                assert float(perplexity[row, column]) == pytest.approx(mean, rel=1e-4)


def test_pmi_subtracts_the_log_probability_after_the_neutral_text(model, tokenizer):
    def alone(context, option):
        ids = torch.tensor([[CHARACTERS.index(c) for c in context + option]])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        return sum(float(logits[t - 1, ids[0, t]]) for t in range(len(context), len(context + option)))

    options = ["dab", "e"]
    plain = score_options(model, tokenizer, [PROMPT], options, "logprob")[0]
    for neutral, context in ((None, " k? "), ("k", "k")):
        found = score_options(model, tokenizer, [PROMPT], options, "pmi", neutral=neutral)[0]
        expected = [float(plain[i]) - alone(context, option) for i, option in enumerate(options)]
        assert found.tolist() == pytest.approx(expected, abs=2e-5)


def test_mean_logit_reads_the_greedy_steps(model, tokenizer):
    out = generate(model, tokenizer, [PROMPT], max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    d, a, b, e = (CHARACTERS.index(c) for c in "dabe")
    expected = [float(out.logits[0][0, d] + out.logits[1][0, a] + out.logits[2][0, b]) / 3, float(out.logits[0][0, e])]
    found = score_options(model, tokenizer, [PROMPT, TWO_SETS], ["dab", "e"])
    assert found[0].tolist() == pytest.approx(expected, abs=2e-5)
    one = score_options(model, tokenizer, [PROMPT], ["dab"], steps=1)
    assert float(one) == pytest.approx(float(out.logits[0][0, d]), abs=2e-5)


@pytest.mark.parametrize("reduction", ["mean_logit", "logprob", "pmi"])
def test_scores_do_not_depend_on_the_order(reduction, model, tokenizer):
    options = ["dab", "e", "fgh"]
    for editing, most in ((SET_BASED, 1e-5), (Editing(canonical=True), 0.0)):
        scores = score_options(model, tokenizer, all_orders(PROMPT), options, reduction, editing=editing)
        assert (scores - scores[:1]).abs().max() <= most * 3
    plain = score_options(model, tokenizer, all_orders(PROMPT), options, reduction, editing=PLAIN)
    assert (plain - plain[:1]).abs().max() > 1e-2


def test_batches_of_scoring_do_not_matter(model, tokenizer):
    prompts = [*all_orders(PROMPT), *all_orders(TWO_SETS)]
    whole = score_options(model, tokenizer, prompts, ["ab", "c"], "logprob", editing=PLAIN)
    small = score_options(model, tokenizer, prompts, ["ab", "c"], "logprob", editing=PLAIN, batch_size=3)
    torch.testing.assert_close(whole, small, atol=1e-5, rtol=0)


def test_ordinary_orders_reports_what_a_loop_over_orders_finds(model, tokenizer):
    prompts = [
        SetPrompt([q, Set(e), "? "]) for q, e in (("ab", ["c.", "dd."]), ("b", ["kl.", "g."]), ("?", ["a", "l"]))
    ]
    options = [["c", "dd"], ["kl", "g"], ["a", "l"]]
    report = ordinary_orders(model, tokenizer, prompts, options, answers=[0, 1, 1], batch_size=4)
    assert report.scores.shape == (3, 2, 2)
    choices = []
    for prompt, row in zip(prompts, options, strict=True):
        here = []
        for order in itertools.permutations(range(2)):
            scores = [sum(continued(model, tokenizer, prompt.permuted(order), o, PLAIN)) for o in row]
            here.append(scores.index(max(scores)))
        choices.append(here)
    right = [[c == a for c in row] for row, a in zip(choices, (0, 1, 1), strict=True)]
    assert report.choices.tolist() == choices
    assert report.flip_rate == pytest.approx(sum(len(set(row)) > 1 for row in choices) / 3)
    columns = [sum(column) / 3 for column in zip(*right, strict=True)]
    assert [report.worst, report.mean, report.best] == pytest.approx([min(columns), sum(columns) / 2, max(columns)])
    assert report.best_of == pytest.approx(sum(map(any, right)) / 3)
    assert report.worst_of == pytest.approx(sum(map(all, right)) / 3)
    assert float(report.spread.max()) > 1e-2
    edited = ordinary_orders(model, tokenizer, prompts, options, editing=SET_BASED)
    assert edited.flip_rate == 0
    assert float(edited.spread.max()) <= 1e-5
    with pytest.raises(ValueError, match="answers"):
        _ = edited.right


def test_random_orders_are_different_and_repeatable():
    prompt = SetPrompt([Set(list("abcd")), "?"])
    first = sbp.listing_orders(prompt, 24, seed=3)
    assert len(set(first)) == 24
    assert first == sbp.listing_orders(prompt, 24, seed=3)
    assert first != sbp.listing_orders(prompt, 24, seed=4)
    assert sbp.listing_orders(prompt, "original and reversed") == [((0, 1, 2, 3),), ((3, 2, 1, 0),)]
    assert sbp.listing_orders(prompt, [[1, 0, 2, 3]]) == [((1, 0, 2, 3),)]
    assert len(sbp.listing_orders(TWO_SETS, "all")) == 12


# prompts and tokens


def test_parse_reads_several_sets_and_own_delimiters():
    text = "q\n<|start_2d|>a <|split_2d|>b<|end_2d|> m <|start_2d|>c<|end_2d|>end"
    prompt = SetPrompt.parse(text)
    assert prompt == SetPrompt(["q\n", Set(["a ", "b"]), " m ", Set(["c"]), "end"])
    assert SetPrompt.parse("x{a/b}y", delimiters=("{", "/", "}")).parts == ("x", Set(["a", "b"]), "y")
    assert prompt.permuted([1, 0], [0]).text == "q\nba  m cend"


def test_parts_are_tokenized_alone_and_special_tokens_stand_at_the_front():
    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<end>": 3}, [("a", "b")]))
    merging = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    assert merging("aab")["input_ids"] == [0, 2]
    prompt = SetPrompt(["a", Set(["a", "ab"]), "b"])
    assert encode(merging, [prompt])["input_ids"].tolist() == [[0, 0, 2, 1]]
    with_front = character_tokenizer("<end> $0")
    assert encode(with_front, [SetPrompt(["a", Set(["b"]), "c"])])["input_ids"].tolist() == [[END, 0, 1, 2]]
    start = encode(with_front, [SetPrompt([Set(["b", "cc"]), "d"])])
    assert start["input_ids"].tolist() == [[END, 1, 2, 2, 3]]
    assert start["position_ids"].tolist() == [[0, 1, 1, 2, 3]]


def test_set_ids_name_text_sets_and_padding(tokenizer):
    batch = encode(tokenizer, [SetPrompt([Set(["a", "bb"]), "c"]), SetPrompt(["ab", Set(["a", "b"]), Set(["c"]), "d"])])
    assert batch["set_ids"].tolist() == [[-1, -1, 1, 1, 1, 0], [0, 0, 1, 1, 2, 0]]
    assert batch["element_ids"].tolist() == [[0, 0, 1, 2, 2, 0], [0, 0, 1, 2, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 0, 1, 2], [0, 1, 2, 2, 3, 4]]


# refusals


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Set(["a", ""]), ValueError, "empty"),
        (lambda: Set([]), ValueError, "at least one element"),
        (lambda: Set("ab"), TypeError, "single string"),
        (lambda: Set(["a", Set(["b"])]), TypeError, "set inside a set"),
        (lambda: SetPrompt(["a"]), ValueError, "no Set"),
        (lambda: SetPrompt("a"), TypeError, "parse"),
        (lambda: SetPrompt([Set(["a"]), 3]), TypeError, "int"),
        (lambda: SetPrompt.parse("plain"), ValueError, "no Set"),
        (lambda: SetPrompt.parse("a<|start_2d|>b"), ValueError, "without"),
        (lambda: SetPrompt.parse("a<|end_2d|>b"), ValueError, "outside a set"),
        (lambda: SetPrompt.parse("a<|split_2d|>b"), ValueError, "outside a set"),
        (lambda: SetPrompt.parse("<|start_2d|>a<|start_2d|>b<|end_2d|><|end_2d|>"), ValueError, "nested"),
        (lambda: SetPrompt.parse("<|start_2d|>a<|split_2d|><|end_2d|>"), ValueError, "empty"),
        (lambda: SetPrompt.parse("a", delimiters=("(", "(", ")")), ValueError, "different"),
        (lambda: PROMPT.permuted([0, 1]), ValueError, "no permutation"),
        (lambda: TWO_SETS.permuted([0, 1]), ValueError, "2 sets, got 1"),
        (lambda: Editing(mask=False, canonical=True), ValueError, "canonical"),
        (lambda: sbp.listing_orders(PROMPT, 7), ValueError, "6 different orders"),
        (lambda: sbp.listing_orders(SetPrompt([Set(list("abcdefgh"))]), "all"), ValueError, "40320"),
        (lambda: sbp.listing_orders(PROMPT, "every"), ValueError, "every"),
        (lambda: sbp.listing_orders(TWO_SETS, [[0, 1]]), ValueError, "one set"),
        (lambda: sbp.listing_orders(PROMPT, [[0, 0, 1]]), ValueError, "no permutation"),
        (lambda: sbp.listing_orders(PROMPT, []), ValueError, "a number or permutations"),
        (lambda: sbp.listing_orders(PROMPT, True), ValueError, "a number or permutations"),
        (lambda: sbp.multiple_choice_prompt("Hot?", "ice"), TypeError, "single string"),
        (lambda: sbp.set_positions([1, ()]), ValueError, "needs elements"),
        (lambda: sbp.set_positions([-1]), ValueError, "not negative"),
    ],
)
def test_prompts_that_mean_nothing_are_refused(make, error, words, without_shape_checks):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: generate(m, t, [SetPrompt(["a", Set(["b", "c"])])]), "ends with a set"),
        (lambda m, t: score_options(m, t, [SetPrompt(["a", Set(["b", "c"])])], ["a"]), "ends with a set"),
        (lambda m, t: generate(m, t, [PROMPT], use_cache=False), "use_cache"),
        (lambda m, t: generate(m, t, [PROMPT], attention_mask=torch.ones(1, 3)), "attention_mask"),
        (lambda m, t: generate(m, t, [PROMPT], prompt_lookup_num_tokens=3), "flat prompt"),
        (lambda m, t: generate(m, t, [PROMPT], no_repeat_ngram_size=2), "no_repeat_ngram_size"),
        (lambda m, t: generate(m, t, [PROMPT], encoder_no_repeat_ngram_size=2), "encoder_no_repeat_ngram_size"),
        (
            lambda m, t: generate(
                m, t, [PROMPT], generation_config=transformers.GenerationConfig(prompt_lookup_num_tokens=3)
            ),
            "flat prompt",
        ),
        (lambda m, t: generate(m, t, [PROMPT], max_new_tokens=60), "position 72"),
        (lambda m, t: generate(m, t, [PROMPT], max_length=82), "position 72"),
        (
            lambda m, t: generate(m, t, [PROMPT], generation_config=transformers.GenerationConfig(max_length=82)),
            "position 72",
        ),
        (lambda m, t: forward(build("llama", max_position_embeddings=13), encode(t, [PROMPT])), "position 13"),
        (lambda m, t: generate(m, t, [PROMPT], store=ElementStore(build("llama"))), "another model"),
        (lambda m, t: generate(m, t, [PROMPT], store=ElementStore(m), editing=PADDED), "Set-Based Prompting only"),
        (lambda m, t: generate(m, t, [PROMPT], return_tensors="np"), "return_tensors"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a"], "best"), "reduction"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a"], neutral="x"), "neutral"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a"], "logprob", steps=3), "steps"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a", ""]), "non-empty"),
        (lambda m, t: score_options(m, t, [PROMPT], "a"), "list of strings"),
        (lambda m, t: score_options(m, t, [PROMPT], [["a"], ["b"]]), "one per prompt"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a"], batch_size=0), "batch_size"),
        (lambda m, t: score_options(m, t, [PROMPT], ["a"], "pmi", neutral=""), "BOS"),
        (lambda m, t: ordinary_orders(m, t, [PROMPT, TWO_SETS], ["a"]), "different numbers of orders"),
        (lambda m, t: ordinary_orders(m, t, [PROMPT], ["a"], answers=[1, 2]), "answers"),
        (lambda m, t: ordinary_orders(m, t, [PROMPT], ["a", "b"], answers=[2]), "options 0..1, got 2"),
        (lambda m, t: ordinary_orders(m, t, [PROMPT], ["a"], batch_size=0), "batch_size"),
        (lambda m, t: ordinary_orders(m, t, [], ["a"]), "empty"),
        (lambda m, t: score_options(m, t, [PROMPT], (o for o in ["a"])), "list of strings"),
        (lambda m, t: encode(t, []), "empty"),
        (lambda m, t: encode(t, [PROMPT], padding_side="middle"), "padding_side"),
        (lambda m, t: encode(t, [PROMPT], return_tensors="tf"), "return_tensors"),
        (lambda m, t: encode(character_tokenizer("<end> $0 <end>"), [PROMPT]), "after the text"),
    ],
)
def test_calls_that_would_go_wrong_are_refused(call, words, model, tokenizer, without_shape_checks):
    with pytest.raises(ValueError, match=words):
        call(model, tokenizer)


@pytest.mark.parametrize(
    "prompts", [PROMPT, "text", ["text"], iter([PROMPT])], ids=["prompt", "text", "list of text", "iterator"]
)
def test_prompts_must_be_a_list_of_prompts(prompts, model, tokenizer, without_shape_checks):
    with pytest.raises(TypeError, match="list of SetPrompt"):
        encode(tokenizer, prompts)
    with pytest.raises(TypeError, match="list of SetPrompt"):
        ordinary_orders(model, tokenizer, prompts, ["a"])


def test_a_set_may_come_from_an_iterator(without_shape_checks):
    assert Set(iter(["a", "b"])) == Set(["a", "b"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mask_of_another_dtype_than_the_model_is_taken_over(attention, dtype, tokenizer, without_shape_checks):
    model = build("gpt2", dtype, attention)
    with torch.no_grad():
        found = forward(model, encode(tokenizer, [PROMPT, TWO_SETS])).logits
        expected = forward(model, encode(tokenizer, [PROMPT, TWO_SETS], dtype=dtype)).logits
    assert torch.equal(found, expected)
    with pytest.raises(TypeError, match="return_tensors='pt'"):
        forward(model, encode(tokenizer, [PROMPT], return_tensors="np"))


def test_a_compiled_model_is_not_taken_for_one_without_positions(model):
    from torchgraft.language.set_based_prompting.encoding import forward_arguments

    assert "position_ids" in forward_arguments(torch.compile(model))


def tiny(config, head):
    return getattr(transformers, head)(config).eval()


UNFIT = {
    "bloom": (
        lambda: tiny(transformers.BloomConfig(vocab_size=18, hidden_size=16, n_layer=1, n_head=2), "BloomForCausalLM"),
        "ALiBi",
    ),
    "mpt": (
        lambda: tiny(transformers.MptConfig(vocab_size=18, d_model=16, n_layers=1, n_heads=2), "MptForCausalLM"),
        "ALiBi",
    ),
    "falcon with alibi": (
        lambda: tiny(
            transformers.FalconConfig(
                vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True
            ),
            "FalconForCausalLM",
        ),
        "ALiBi",
    ),
    "t5": (
        lambda: tiny(
            transformers.T5Config(vocab_size=18, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            "T5ForConditionalGeneration",
        ),
        "encoder-decoder",
    ),
    "bert": (
        lambda: tiny(
            transformers.BertConfig(
                vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            ),
            "BertForMaskedLM",
        ),
        "cannot generate",
    ),
    "bert with a language-modelling head": (
        lambda: tiny(
            transformers.BertConfig(
                vocab_size=18, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            ),
            "BertLMHeadModel",
        ),
        "cache",
    ),
    "mamba": (
        lambda: tiny(
            transformers.MambaConfig(vocab_size=18, hidden_size=16, state_size=4, num_hidden_layers=1),
            "MambaForCausalLM",
        ),
        "position_ids",
    ),
    "sliding window": (lambda: build("mistral", sliding_window=16), "sliding attention window of 16"),
    "local window of gpt-neo": (
        lambda: tiny(
            transformers.GPTNeoConfig(
                vocab_size=18,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global", "local"], 1]],
                window_size=16,
                max_position_embeddings=64,
            ),
            "GPTNeoForCausalLM",
        ),
        "local attention window of 16",
    ),
    "no head": (lambda: tiny(FAMILIES["llama"](), "LlamaModel"), "cannot generate"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_do_it_are_refused_with_the_remedy(name, tokenizer):
    make, words = UNFIT[name]
    with pytest.raises(ValueError, match=words) as refusal:
        generate(make(), tokenizer, [PROMPT], max_new_tokens=2)
    assert "use a" in str(refusal.value) or "needed" in str(refusal.value) or "does not run" in str(refusal.value)


def test_a_window_that_hides_nothing_is_accepted(tokenizer):
    windowed, full = build("mistral", sliding_window=40), build("mistral", sliding_window=None)
    found = [generate(m, tokenizer, all_orders(PROMPT), max_new_tokens=8) for m in (windowed, full)]
    assert found[0] == found[1]


def test_backend_mode_and_type_are_checked(tokenizer):
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        sbp.check_model(model)
    model = build("llama").train()
    with pytest.raises(ValueError, match="eval"):
        sbp.check_model(model)
    with pytest.raises(TypeError, match="Linear"):
        sbp.check_model(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_model_that_silently_ignores_what_it_is_given_is_found_out(ignored, tokenizer):
    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if ignored == "position_ids":
                return super().forward(input_ids, attention_mask=attention_mask, **kwargs)
            return super().forward(input_ids, position_ids=position_ids, attention_mask=None, **kwargs)

    torch.manual_seed(0)
    model = Deaf(FAMILIES["llama"]()).eval()
    with pytest.raises(ValueError, match="ignores the " + ignored.split("_")[0]):
        generate(model, tokenizer, [PROMPT], max_new_tokens=2)


def test_multiple_choice_prompt_is_the_official_one():
    prompt = sbp.multiple_choice_prompt("Hot?", ["ice", "fire"])
    markup = 'Hot?\n<|start_2d|>"\n- ice" <|split_2d|>"\n- fire" <|end_2d|>Answer: '
    assert prompt == SetPrompt.parse(markup)


def test_the_toy_model_is_the_same_every_time_and_depends_on_the_order():
    state = torch.get_rng_state()
    (model, bytewise), (again, _) = sbp.toy_model(), sbp.toy_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, sbp.toy_model(seed=1)[0].lm_head.weight)
    text = "naïve €\n"
    assert bytewise(text)["input_ids"] == list(text.encode())
    assert bytewise.decode(list(text.encode())) == text
    prompts = all_orders(sbp.multiple_choice_prompt("Hot?", ["ice", "a fire", "snow"]))
    assert change(suffix_logits(model, bytewise, prompts)) <= 1e-4
    assert change(suffix_logits(model, bytewise, prompts, PLAIN)) > 0.1


@pytest.mark.parametrize("width", [0, 6])
def test_toy_model_refuses_a_width_it_cannot_have(width):
    with pytest.raises(ValueError, match="multiple of 4"):
        sbp.toy_model(width=width)


def test_worst_and_best_of_two_of_the_recipe_are_means_over_pairs_of_orders():
    from torchgraft.recipes.set_based_prompting import _of_two

    choices = torch.randint(0, 3, (5, 4), generator=torch.Generator().manual_seed(0))
    report = sbp.OrderReport(F.one_hot(choices, 3).float(), [], torch.tensor([0, 1, 2, 0, 1]))
    worst, best = _of_two(report)
    pairs = [[(a, b) for a, b in itertools.combinations(row, 2)] for row in report.right.tolist()]
    assert worst.examples["accuracy"] == pytest.approx([sum(a and b for a, b in row) / 6 for row in pairs])
    assert best.examples["accuracy"] == pytest.approx([sum(a or b for a, b in row) / 6 for row in pairs])
    assert worst.metrics["accuracy"] < float(report.right.float().mean()) < best.metrics["accuracy"]


@pytest.mark.slow
def test_on_a_real_model():
    """Suffix logits of SmolLM2 to 1e-4 for all orders of three options; the plain prompt moves."""
    from torchgraft import zoo

    try:
        model, tokenizer = zoo.load("smollm2-135m-instruct")
    except (OSError, FileNotFoundError) as error:
        pytest.skip(f"no model here: {error}")
    prompt = sbp.multiple_choice_prompt("What do you read?", ["a cup", "a book", "a sock"])
    with torch.no_grad():
        batch = {e: encode(tokenizer, all_orders(prompt), editing=e) for e in (SET_BASED, PLAIN)}
        edited, plain = (forward(model, batch[e], logits_to_keep=3).logits for e in (SET_BASED, PLAIN))
    assert change(edited) <= 1e-4
    assert change(plain) > 0.1
