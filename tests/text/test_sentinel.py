import copy
import hashlib
import io
import json
import logging
import pickle
import random
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from torchgraft import zoo
from torchgraft.text.sentinel import (
    SentinelKey,
    SentinelTokenizer,
    adapt,
    encrypt_dataset,
    frequency_attack,
    glide,
    gram_fingerprint,
    known_plaintext_attack,
    pairwise_swaps,
    permuted_rows,
    recovery_attack,
    reflect,
    token_hash,
    toy_model,
    toy_reviews,
)
from torchgraft.text.sentinel import keys as keys_module

PASSKEY = "Zq7-a-passkey-that-stands-nowhere-else"
KEY = SentinelKey(PASSKEY)
TEXTS = ["what a good film , funny .", "this is a dull story", "snow ☃ in a zebra's cast", ""]
PAIRS = [("what a film", "it remains a bleak drama ."), ("good", "bad bad bad"), ("a film", "")]
CAUSAL = ("llama", "mistral", "qwen2", "gemma", "gpt2", "opt")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "xlm-roberta", "albert", "deberta-v2", "t5")
TOKENIZERS = {kind: toy_model(kind)[1] for kind in ("bert", "roberta", "llama")}
CLIENTS = {kind: SentinelTokenizer(tokenizer, KEY) for kind, tokenizer in TOKENIZERS.items()}
SERVERS = {kind: client.as_server_tokenizer() for kind, client in CLIENTS.items()}
STYLE = {"roberta": "roberta", "xlm-roberta": "roberta", "gpt2": "roberta", "opt": "roberta", "qwen2": "roberta"}


def tokenizer_of(kind):
    return TOKENIZERS["bert" if kind in ENCODERS and kind not in STYLE else STYLE.get(kind, "llama")]


def model_of(kind, head="", dtype=torch.float64, **settings):
    """A random model of a family, with weights large enough for every part to matter."""
    tokenizer = tokenizer_of(kind)
    sizes = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 80, "num_key_value_heads": 2, "head_dim": 4,
        "embedding_size": 12, "d_kv": 4, "d_ff": 24, "ffn_dim": 24, "hidden_dim": 24, "word_embed_proj_dim": 16,
    }  # fmt: skip
    sizes |= {"num_layers": 2} if kind == "t5" else {"embedding_size": 16} if kind == "deberta-v2" else {}
    sizes |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | settings)
    made = transformers.T5EncoderModel if kind == "t5" and not head else getattr(transformers, f"AutoModel{head}")
    model = made(config) if made is transformers.T5EncoderModel else made.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval().to(dtype)


def answers(model, tokenizer, texts, **how):
    inputs = tokenizer(*texts, return_tensors="pt", padding=True, **how)
    if "token_type_ids" in inputs and type(model).__name__.startswith(("T5", "DistilBert")):
        del inputs["token_type_ids"]
    with torch.no_grad():
        out = model(**inputs)
    return inputs, out.logits if "logits" in out else out.last_hidden_state


def same_answers(model, adapted, tokenizer, server, client, texts, tolerance=1e-9, **how):
    plain, expected = answers(model, tokenizer, texts, **how)
    sent, got = answers(adapted, server, [client.encrypt_batch(side) for side in texts], **how)
    assert torch.equal(sent["input_ids"], client.permutation[plain["input_ids"]])
    assert torch.equal(sent["attention_mask"], plain["attention_mask"])
    if got.shape[-1] == model.config.vocab_size:
        got = got[..., torch.cat([client.permutation, torch.arange(len(client.permutation), got.shape[-1])])]
    if got.ndim == 3:  # places of padding carry no meaning
        got, expected = (t[plain["attention_mask"].bool()] for t in (got, expected))
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def distances(rows):
    return torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- keys


def test_hashes_swaps_and_glides_are_the_official_ones():
    # encrypt_token_using_blake, random_shuffle, shuffle_embedding_matrix, reflection and glide_rotation of
    # llm_converter.py, abhijitmishra/sentinellm-aaai2024, commit 11f6924
    official = SentinelKey("languagemodel123", scheme="official")
    for token, expected in {
        "hello": "c2122169084a7c37711934dfbddf65f0", "##ing": "3d053626e77905c9f221d40ad5b76235",
        "Ġthe": "a979dd8c9e047b6a59e7fb23e2966a7b", "▁é": "ea916b8be5d7160ff056ff56d44f1cb0",
    }.items():  # fmt: skip
        assert token_hash(b"languagemodel123", token) == official.token_hashes([token])[0] == expected
    mapping = [
        0, 27, 25, 3, 19, 5, 14, 8, 7, 9, 28, 11, 12, 16, 6, 22, 13, 18, 17, 4, 20, 21, 15, 23, 24, 2, 26, 1, 10, 29
    ]  # fmt: skip
    swaps = pairwise_swaps([i for i in range(30) if i not in (0, 3, 29)], 1234)
    assert [swaps.get(i, i) for i in range(30)] == mapping
    rows = [
        0, 54, 50, 6, 38, 10, 28, 16, 14, 18, 56, 22, 24, 32, 12, 44, 26, 36, 34, 8, 40, 42, 30, 46, 48, 4, 52, 2, 20,
        58,
    ]  # fmt: skip
    moved = permuted_rows(torch.arange(0, 60, 2, dtype=torch.float64)[:, None], torch.tensor(mapping))
    assert moved[:, 0].tolist() == rows

    matrix = torch.tensor(
        [[3, 6, -9, -6], [-6, -2, 0, 9], [-5, -3, 3, -8], [-3, -2, 5, 8], [-4, 4, -1, 0]], dtype=torch.float64
    )
    line, shift = (torch.tensor(v, dtype=torch.float64) for v in ([1, -2, 0.5, 3], [0.25, 0, -1, 2]))
    first = torch.tensor([7.421052631578948, -2.8421052631578956, -6.789473684210526, 7.2631578947368425])
    torch.testing.assert_close(reflect(matrix, line)[0], first.double(), atol=1e-6, rtol=0)
    glided = [
        [7.671052631578948, -2.8421052631578956, -7.789473684210526, 9.263157894736842],
        [-9.258771929824562, 5.017543859649122, -2.754385964912281, 0.4736842105263168],
        [-1.7324561403508771, -9.035087719298247, 3.5087719298245617, 3.052631578947368],
        [-6.609649122807017, 5.719298245614035, 2.0701754385964914, -1.578947368421053],
        [-1.9956140350877192, 0.4912280701754388, -1.1228070175438596, 7.263157894736842],
    ]
    expected = torch.tensor(glided, dtype=torch.float64)
    torch.testing.assert_close(glide(matrix, line[None], shift[None]), expected, atol=1e-10, rtol=0)
    # main's loop with K = 3, its generator seeded by the sum of the passkey's characters
    three = [
        [6.825452984976415, 9.825452984976415, -5.1745470150235855, -2.1745470150235837],
        [-5.674547015023584, -1.6745470150235846, 0.3254529849764155, 9.325452984976415],
        [2.325452984976417, 4.325452984976417, 10.325452984976417, -0.6745470150235827],
        [-6.174547015023585, -5.174547015023585, 1.8254529849764163, 4.825452984976416],
        [-2.6745470150235833, 5.325452984976415, 0.32545298497641595, 1.325452984976416],
    ]
    lines, shifts = map(torch.from_numpy, official.directions("official", 3, 4))
    expected = torch.tensor(three, dtype=torch.float64)
    torch.testing.assert_close(glide(matrix, lines, shifts), expected, atol=1e-10, rtol=0)


def test_derived_keys_are_blake2b_of_passkey_and_context_and_independent():
    sub = hashlib.blake2b(b"ctx", key=b"pass", person=b"token hash", digest_size=32).digest()
    key = SentinelKey("pass", b"ctx")
    assert key.token_hashes(["b", "a"])[1] == hashlib.blake2b(b"a", key=sub, digest_size=16).hexdigest()
    assert key == SentinelKey(b"pass", b"ctx")
    ids = range(2, 500)
    for other in (SentinelKey("pass"), SentinelKey("pasS", b"ctx"), SentinelKey("ssap", b"ctx")):
        assert key != other
        assert key.token_hashes(["a"]) != other.token_hashes(["a"])
        assert key.reindexed(ids) != other.reindexed(ids)
        assert not np.array_equal(key.directions("random", 1, 8)[0], other.directions("random", 1, 8)[0])
        assert not np.array_equal(key.directions("official", 1, 8)[0], other.directions("official", 1, 8)[0])
    # the script's seed is a sum of characters: anagrams collide, except in their hashes
    one, two = (SentinelKey(word, scheme="official") for word in ("listen", "silent"))
    assert one.reindexed(ids) == two.reindexed(ids)
    assert one.token_hashes(["a"]) != two.token_hashes(["a"])


def test_the_same_key_gives_the_same_bits_in_another_process():
    code = (
        "import runpy, sys; k = runpy.run_path(sys.argv[1])['SentinelKey'](sys.argv[2]); "
        "print(k.token_hashes(['a']), list(k.reindexed(range(50)).items()), "
        "k.directions('random', 2, 5)[1].tobytes().hex())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, keys_module.__file__, PASSKEY], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "77"},
    ).stdout  # fmt: skip
    mine = KEY.token_hashes(["a"]), list(KEY.reindexed(range(50)).items()), KEY.directions("random", 2, 5)[1]
    assert out.strip() == f"{mine[0]} {mine[1]} {mine[2].tobytes().hex()}"


@given(st.sets(st.integers(0, 10**6), max_size=60), st.sampled_from(["derived", "official"]), st.text(max_size=15))
@settings(max_examples=60, deadline=None)
def test_reindexing_is_a_bijection(ids, scheme, passkey):
    key = SentinelKey("k" + passkey, scheme=scheme)
    moved = key.reindexed(list(ids))
    assert set(moved) == set(moved.values()) == ids
    if scheme == "official":
        assert all(moved[moved[i]] == i for i in ids)


def test_random_directions_look_normal_and_do_not_depend_on_how_many_follow():
    lines, shifts = KEY.directions("random", 3, 20_000)
    for values in (*lines, *shifts):
        assert abs(values.mean()) < 0.03  # four standard errors
        assert abs(values.std() - 1) < 0.02
        assert abs((np.abs(values) > 2).mean() - 0.0455) < 0.006
    assert abs(np.corrcoef([*lines, *shifts]) - np.eye(6)).max() < 0.03
    assert np.array_equal(KEY.directions("random", 1, 20_000)[1][0], shifts[0])


def test_the_key_shows_itself_nowhere(tmp_path, caplog, capsys):
    secrets = [PASSKEY, KEY._token.hex(), repr(KEY._token), KEY._order.hex(), KEY._geometry.hex()]
    tokenizer = TOKENIZERS["bert"]
    with caplog.at_level(logging.DEBUG):
        model, server, report = adapt(model_of("bert"), tokenizer, KEY)
        client = SentinelTokenizer(tokenizer, KEY)
        client.encrypt(TEXTS[0])
        model.save_pretrained(tmp_path)
        server.save_pretrained(tmp_path)
    shown = [repr(KEY), str(KEY), f"{KEY}", repr(client), repr(report), repr(server), repr(model.config), caplog.text]
    shown += [*capsys.readouterr()]
    shown += [path.read_bytes().decode("latin1") for path in tmp_path.iterdir()]
    assert not [secret for secret in secrets for text in shown if secret in text]
    assert not hasattr(KEY, "__dict__")
    for thing in (KEY, client, {"key": KEY}):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)
        with pytest.raises(TypeError, match="not pickled"):
            torch.save(thing, io.BytesIO())
    assert copy.deepcopy({"key": KEY})["key"] == KEY


@pytest.mark.parametrize(
    ("passkey", "how", "error", "words"),
    [
        ("", {}, ValueError, "1 to 64 bytes, got 0"),
        ("x" * 65, {}, ValueError, "1 to 64 bytes, got 65"),
        ("é" * 33, {}, ValueError, "got 66"),
        (12345, {}, TypeError, "str or bytes, got int"),
        ("\udc80secret", {}, ValueError, "UTF-8"),
        ("k", {"scheme": "md5"}, ValueError, "'derived' or 'official'"),
        ("k", {"scheme": "official", "context": b"a"}, ValueError, "context"),
        (b"k", {"scheme": "official"}, TypeError, "must be str"),
        ("k", {"context": "text"}, TypeError, "context must be bytes"),
    ],
)
def test_bad_passkeys_are_refused_without_showing_them(without_shape_checks, passkey, how, error, words):
    with pytest.raises(error, match=words) as caught:
        SentinelKey(passkey, **how)
    assert "secret" not in str(caught.value)
    assert "12345" not in str(caught.value)


def test_the_passkey_is_in_no_frame_and_no_cause_of_an_error(without_shape_checks):
    # what reporters of errors collect: locals of every frame, and the errors behind the error
    wrong = [("\udc80-hush-hush", {}), ("hush-hush" * 9, {}), ("hush-hush", {"scheme": "md5"}),
             (b"hush-hush", {"scheme": "official"}), (["hush-hush"], {})]  # fmt: skip
    for passkey, how in wrong:
        with pytest.raises((TypeError, ValueError)) as caught:
            SentinelKey(passkey, **how)
        assert caught.value.__context__ is None
        told = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        inside = [frame for frame in told.stack if frame.filename == keys_module.__file__]
        assert len(inside) == 1
        assert "hush" not in str(inside[0].locals)
    client = SentinelTokenizer(TOKENIZERS["bert"], KEY)
    for duplicate in (copy.copy(client), copy.deepcopy(client)):
        assert duplicate.encrypt("a good film") == client.encrypt("a good film")


# --- geometry


def test_glide_is_the_naive_formula_and_an_isometry():
    rng = np.random.default_rng(0)
    rows, lines, shifts = rng.normal(size=(40, 7)), rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    naive = rows.copy()
    for line, shift in zip(lines, shifts, strict=True):
        for i, w in enumerate(naive):
            naive[i] = w - 2 * (w @ line) / (line @ line) * line + shift
    moved = glide(*map(torch.from_numpy, (rows, lines, shifts)))
    np.testing.assert_allclose(moved.numpy(), naive, atol=1e-12)
    assert (distances(torch.from_numpy(rows)) - distances(moved)).abs().max() < 1e-10
    # float32 is rounded once, at the end
    single = glide(torch.from_numpy(rows).float(), *map(torch.from_numpy, (lines, shifts)))
    assert single.dtype == torch.float32
    exact = glide(torch.from_numpy(rows).float().double(), *map(torch.from_numpy, (lines, shifts)))
    assert torch.equal(single, exact.float())
    # more rows than one chunk, the last one not full
    many = torch.from_numpy(rng.normal(size=(2500, 7)))
    torch.testing.assert_close(glide(many, *map(torch.from_numpy, (lines, shifts)))[2490:],
                               glide(many[2490:], *map(torch.from_numpy, (lines, shifts))))  # fmt: skip


def test_an_even_number_of_equal_reflections_is_the_identity():
    rows, line = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    nothing = torch.zeros(4, 5, dtype=torch.float64)
    torch.testing.assert_close(glide(rows, line.expand(4, 5), nothing), rows)
    torch.testing.assert_close(glide(rows, line.expand(3, 5), nothing[:3]), reflect(rows, line))
    torch.testing.assert_close(reflect(rows, 7 * line), reflect(rows, line))


def test_official_directions_with_two_steps_are_a_mere_translation():
    lines, shifts = map(torch.from_numpy, SentinelKey("any", scheme="official").directions("official", 2, 6))
    rows = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(glide(rows, lines, shifts), rows + shifts[1] - shifts[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adapted_rows_keep_their_distances(dtype):
    model, tokenizer = model_of("llama", dtype=dtype), TOKENIZERS["llama"]
    adapted, _, report = adapt(model, tokenizer, KEY, glide_steps=3)
    old, new = (m.get_input_embeddings().weight for m in (model, adapted))
    assert new.dtype == dtype
    order = SentinelTokenizer(tokenizer, KEY).permutation
    n = len(order)
    before, after = distances(old)[:n, :n], distances(new)[order][:, order]
    assert (before - after).abs().max() < {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert report.shift > 0.5
    # norms change, unless told not to
    assert (old.double().norm(dim=1)[:n] - new.double().norm(dim=1)[order]).abs().max() > 0.1
    kept = adapt(model, tokenizer, KEY, scale_preserving=True)[0].get_input_embeddings().weight.double()
    slack = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(kept.norm(dim=1)[order], old.double().norm(dim=1)[:n], atol=slack, rtol=0)


def test_wrong_shapes_of_directions_are_named(without_shape_checks):
    with pytest.raises(ValueError, match=r"must both be \(steps, 4\)"):
        glide(torch.zeros(3, 4), torch.ones(1, 5), torch.ones(1, 5))
    for line in (torch.zeros(1, 4), torch.full((1, 4), float("nan")), torch.full((1, 4), float("inf"))):
        with pytest.raises(ValueError, match="a row that is zero or not finite"):
            glide(torch.zeros(3, 4), line, torch.ones(1, 4))
    with pytest.raises(TypeError, match="floating-point"):
        glide(torch.zeros(3, 4, dtype=torch.long), torch.ones(1, 4), torch.ones(1, 4))


# --- the client's and the server's tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_server_ids_are_permuted_original_ids(kind):
    tokenizer = TOKENIZERS[kind]
    client = SentinelTokenizer(tokenizer, KEY)
    server = client.as_server_tokenizer()
    texts = [
        *toy_reviews(1000, 3)[0],
        *TEXTS,
        "Unseen Wörds, 1984!  two  spaces\ttab\nline",
        f"a {tokenizer.unk_token} b",
    ]
    plain, sent = tokenizer(texts)["input_ids"], server(client.encrypt_batch(texts))["input_ids"]
    assert [client.permutation[torch.tensor(row, dtype=torch.long)].tolist() for row in plain] == sent
    assert [client.restore_ids(row).tolist() for row in sent] == plain
    fixed = torch.tensor([i in client.special for i in range(len(client.permutation))])
    assert torch.equal(client.permutation[fixed], torch.arange(len(fixed))[fixed])
    hashes = [h for h in server.get_vocab() if h not in tokenizer.all_special_tokens]
    assert len(set(hashes)) == len(tokenizer) - len(tokenizer.all_special_tokens)
    assert all(len(h) == 32 and set(h) <= set("0123456789abcdef") for h in hashes)
    assert client.decrypt_ids(sent[:3]) == [tokenizer.decode(row, skip_special_tokens=True) for row in plain[:3]]
    assert client.decrypt(client.encrypt(texts[0])) == tokenizer.decode(plain[0], skip_special_tokens=True)
    client.check(server)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pairs_words_truncation_and_overflow(kind):
    tokenizer = TOKENIZERS[kind]
    client = SentinelTokenizer(tokenizer, KEY)
    server = client.as_server_tokenizer()

    def same(mine, theirs):
        for row, expected in zip(mine["input_ids"], theirs["input_ids"], strict=True):
            assert row == client.permutation[torch.tensor(expected)].tolist()
        for name in set(theirs) - {"input_ids"}:
            assert mine[name] == theirs[name], name

    sides = [list(side) for side in zip(*(client.encrypt(pair) for pair in PAIRS), strict=True)]
    plain = [list(side) for side in zip(*PAIRS, strict=True)]
    for how in ({}, {"truncation": True, "max_length": 7}, {"truncation": "only_second", "max_length": 9}):
        same(server(*sides, padding=True, **how), tokenizer(*plain, padding=True, **how))
    overflow = {"truncation": True, "max_length": 6, "stride": 2, "return_overflowing_tokens": True}
    same(server(client.encrypt_batch(TEXTS), **overflow), tokenizer(TEXTS, **overflow))

    words = [["what", "filmstory", "☃", "", tokenizer.unk_token], ["good"], []]
    sent = client.encrypt_batch(words)
    assert [len(row) for row in sent] == [5, 1, 0]
    assert sent[0][3] == ""
    for row, hashed in zip(words[:2], sent[:2], strict=True):
        mine, theirs = (t(x, is_split_into_words=True) for t, x in ((server, hashed), (tokenizer, row)))
        assert mine["input_ids"] == client.permutation[torch.tensor(theirs["input_ids"])].tolist()
        assert mine.word_ids() == theirs.word_ids()


def test_a_mixed_batch_keeps_its_order():
    client = SentinelTokenizer(TOKENIZERS["bert"], KEY)
    mixed = ["a film", ("good", "bad"), ["what", "a"], "a story", ["good"]]
    assert client.encrypt_batch(mixed) == [client.encrypt(text) for text in mixed]


@given(st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_any_text_goes_the_same_way(text):
    for kind, tokenizer in TOKENIZERS.items():
        sent = SERVERS[kind](CLIENTS[kind].encrypt(text))["input_ids"]
        assert CLIENTS[kind].restore_ids(torch.tensor(sent, dtype=torch.long)).tolist() == tokenizer(text)["input_ids"]


def test_added_tokens_that_are_not_special_are_hashed_and_special_ones_stay():
    tokenizer = copy.deepcopy(TOKENIZERS["bert"])
    tokenizer.add_tokens(["tenant-name"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    client = SentinelTokenizer(tokenizer, KEY)
    sent = client.encrypt("good tenant-name <turn> film")
    assert "<turn>" in sent
    assert "tenant" not in sent
    assert len(sent.split()) == 4
    server = client.as_server_tokenizer()
    assert (
        client.restore_ids(server(sent)["input_ids"]).tolist() == tokenizer("good tenant-name <turn> film")["input_ids"]
    )
    assert not [t for t in server.get_vocab() if "tenant" in t]
    assert set(server.all_special_tokens) == set(tokenizer.all_special_tokens)


def test_without_shuffling_ids_stay_and_official_shuffling_is_an_involution():
    tokenizer = TOKENIZERS["bert"]
    still = SentinelTokenizer(tokenizer, KEY, shuffle=False).permutation
    assert torch.equal(still, torch.arange(len(tokenizer)))
    swapped = SentinelTokenizer(tokenizer, SentinelKey("languagemodel123", scheme="official")).permutation
    assert torch.equal(swapped[swapped], still)
    assert (swapped != still).float().mean() > 0.8


def test_a_wrong_key_is_noticed_on_either_side():
    tokenizer = TOKENIZERS["bert"]
    mine, theirs = (SentinelTokenizer(tokenizer, SentinelKey(k)) for k in ("one", "two"))
    server = mine.as_server_tokenizer()
    with pytest.raises(ValueError, match="wrong key or wrong tokenizer: the server knows 0 of"):
        theirs.check(server)
    with pytest.raises(ValueError, match="wrong key: 2 of 2"):
        theirs.decrypt(mine.encrypt("a film"))
    with pytest.raises(ValueError, match="was shuffle= the same"):
        SentinelTokenizer(tokenizer, SentinelKey("one"), shuffle=False).check(server)
    # the server sees nothing but unknown words
    ids = server(theirs.encrypt("what a good film"))["input_ids"]
    assert ids[1:-1] == [tokenizer.unk_token_id] * 4


def test_bad_texts_and_tokenizers_are_named(without_shape_checks, monkeypatch):
    tokenizer = TOKENIZERS["bert"]
    client = SentinelTokenizer(tokenizer, KEY)
    sent = client.encrypt("a good film")
    for again in (sent, (sent, sent), sent.split(), f"[CLS] {sent} [SEP]"):
        with pytest.raises(ValueError, match="encrypted already"):
            client.encrypt(again)
    assert client.encrypt(f"see {sent}")  # a readable text that quotes hashes
    for wrong in (3, ("a", "b", "c"), {"text": "a"}, [1], None):
        with pytest.raises(TypeError, match="str, a pair"):
            client.encrypt(wrong)
    with pytest.raises(TypeError, match="use encrypt"):
        client.encrypt_batch("a good film")
    with pytest.raises(TypeError, match="must be a SentinelKey"):
        SentinelTokenizer(tokenizer, "passkey")
    with pytest.raises(ValueError, match="hashes already"):
        SentinelTokenizer(client.as_server_tokenizer(), KEY)
    with pytest.raises(ValueError, match="fast tokenizer"):
        SentinelTokenizer(object(), KEY)
    for ids in ([-1], [len(tokenizer)]):
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\."):
            client.decrypt_ids(ids)
    for ids in (torch.tensor(5), [1.5], [True, False]):
        with pytest.raises(TypeError, match="ids must be"):
            client.decrypt_ids(ids)
    with pytest.raises(TypeError, match="text must be a str, got int"):
        client.decrypt(3)
    with pytest.raises(TypeError, match="must be a tokenizer"):
        client.check("server")
    without = copy.deepcopy(tokenizer)
    without.unk_token = None
    with pytest.raises(ValueError, match="no unk_token"):
        SentinelTokenizer(without, KEY)
    odd = copy.deepcopy(tokenizer)
    odd.add_special_tokens({"extra_special_tokens": ["fade"]})
    with pytest.raises(ValueError, match="'fade', which could stand inside a hash"):
        SentinelTokenizer(odd, KEY)
    monkeypatch.setattr(SentinelKey, "token_hashes", lambda self, tokens: ["0" * 32 for _ in tokens])
    with pytest.raises(ValueError, match="two tokens with the same hash"):
        SentinelTokenizer(tokenizer, KEY)


# --- the adapted model


@pytest.mark.parametrize("kind", [*ENCODERS, *CAUSAL])
def test_without_glides_the_function_is_exactly_the_same(kind):
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, "ForCausalLM" if kind in CAUSAL else "")
    before = state(model)
    adapted, server, report = adapt(model, tokenizer, KEY, glide_steps=0)
    client = SentinelTokenizer(tokenizer, KEY)
    same_answers(model, adapted, tokenizer, server, client, [TEXTS])
    same_answers(model, adapted, tokenizer, server, client, [list(side) for side in zip(*PAIRS, strict=True)])
    same_answers(model, adapted, tokenizer, server, client, [TEXTS], truncation=True, max_length=5)
    words = [["what", "filmstory", "☃"], ["good"], ["a", "zebra's", "cast"]]
    same_answers(model, adapted, tokenizer, server, client, [words], is_split_into_words=True)
    assert same_state(model, before)
    assert report.moved > 0.9 * (len(tokenizer) - report.special)
    assert report.special == len(client.special)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("bert", 1), ("bert", 2), ("bert", 3), ("roberta", 2), ("distilbert", 2), ("electra", 3), ("xlm-roberta", 2),
        ("albert", 2), ("deberta-v2", 3),
    ],
)  # fmt: skip
def test_layernorm_after_the_embedding_undoes_official_directions_and_not_random_ones(kind, steps):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    client = SentinelTokenizer(tokenizer, KEY)
    adapted, server, report = adapt(model, tokenizer, KEY, glide_steps=steps, directions="official")
    same_answers(model, adapted, tokenizer, server, client, [TEXTS], tolerance=1e-6)
    assert any("all-ones" in warning for warning in report.warnings)
    mine, base = (m.get_input_embeddings().weight for m in (adapted, model))
    assert not torch.equal(mine[client.permutation], base[: len(client.permutation)])
    adapted, server, report = adapt(model, tokenizer, KEY, glide_steps=steps)
    with pytest.raises(AssertionError, match="not close"):
        same_answers(model, adapted, tokenizer, server, client, [TEXTS], tolerance=0.05)
    assert report.warnings == ()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_a_translation_taken_off_the_positions_leaves_reflections_alone(kind):
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    far, mirrored = (
        adapt(model, tokenizer, KEY, **how)[0] for how in ({"translation": 8.0}, {"scale_preserving": True})
    )
    moved = far.get_input_embeddings().weight - mirrored.get_input_embeddings().weight
    assert (moved - moved[0]).abs().max() < 1e-12  # one translation for all rows
    positions = next(m for name, m in far.named_modules() if name.endswith("position_embeddings"))
    sent = [SentinelTokenizer(tokenizer, KEY).encrypt_batch(TEXTS[:3])]
    server = SERVERS["roberta" if kind == "roberta" else "bert"]
    expected = answers(mirrored, server, sent)[1]
    assert (answers(far, server, sent)[1] - expected).abs().max() > 0.1
    with torch.no_grad():
        positions.weight -= moved[0]
    torch.testing.assert_close(answers(far, server, sent)[1], expected, atol=1e-9, rtol=0)


def test_a_model_with_adapters_of_peft_is_adapted_and_one_wrapped_at_its_embedding_refused():
    peft = pytest.importorskip("peft")
    tokenizer, client = TOKENIZERS["llama"], CLIENTS["llama"]
    how = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(model_of("llama", "ForCausalLM"), peft.LoraConfig(**how))
    adapted, server, _ = adapt(model, tokenizer, KEY, glide_steps=0)
    same_answers(model, adapted, tokenizer, server, client, [TEXTS[:3]])
    wrapped = peft.get_peft_model(
        model_of("llama", "ForCausalLM"), peft.LoraConfig(**how, modules_to_save=["embed_tokens"])
    )
    with pytest.raises(ValueError, match=r"before anything is put around its embedding \(peft"):
        adapt(wrapped, tokenizer, KEY)


def test_rms_norm_does_not_undo_official_directions():
    model, tokenizer = model_of("llama"), TOKENIZERS["llama"]
    adapted, server, _ = adapt(model, tokenizer, KEY, directions="official")
    with pytest.raises(AssertionError, match="not close"):
        same_answers(model, adapted, tokenizer, server, SentinelTokenizer(tokenizer, KEY), [TEXTS], tolerance=0.05)


@pytest.mark.parametrize(
    ("kind", "head", "tie"),
    [
        ("llama", "ForCausalLM", True), ("llama", "ForCausalLM", False), ("gpt2", "ForCausalLM", True),
        ("gemma", "ForCausalLM", True), ("bert", "ForMaskedLM", True), ("roberta", "ForMaskedLM", True),
        ("distilbert", "ForMaskedLM", True), ("electra", "ForMaskedLM", True),
        ("bert", "ForSequenceClassification", True), ("roberta", "ForTokenClassification", True),
        ("llama", "ForSequenceClassification", True),
    ],
)  # fmt: skip
def test_heads_follow_and_everything_survives_saving(kind, head, tie, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, head, tie_word_embeddings=tie)
    client = SentinelTokenizer(tokenizer, KEY)
    for steps, directory in ((0, tmp_path / "0"), (2, tmp_path / "2")):
        adapted, server, report = adapt(model, tokenizer, KEY, glide_steps=steps, scale_preserving=True)
        lm = head in ("ForCausalLM", "ForMaskedLM")
        assert report.head == ("none" if not lm else "own" if not tie else "untied" if steps else "tied")
        assert any("output head" in w for w in report.warnings) == (lm and steps > 0)
        if lm and steps:
            # with the mirrors taken off the embedding again, the head must give the original logits
            lines, shifts = map(
                torch.from_numpy, KEY.directions("random", steps, model.get_input_embeddings().embedding_dim)
            )
            bare = copy.deepcopy(adapted)
            with torch.no_grad():
                weight = bare.get_input_embeddings().weight
                weight.copy_(glide(weight, lines.flip(0), torch.zeros_like(shifts)))
            same_answers(model, bare, tokenizer, server, client, [TEXTS])
            assert adapted.get_output_embeddings().weight is not adapted.get_input_embeddings().weight
        elif not steps:
            same_answers(model, adapted, tokenizer, server, client, [TEXTS[:3]])
        adapted.save_pretrained(directory)
        server.save_pretrained(directory)
        loaded = type(model).from_pretrained(directory, dtype=torch.float64).eval()
        again = AutoTokenizer.from_pretrained(directory)
        client.check(again)
        with pytest.raises(ValueError, match="adapted already"):
            adapt(loaded, tokenizer, KEY)
        sent = [client.encrypt_batch(TEXTS[:3])]
        for mine, theirs in zip(answers(adapted, server, sent), answers(loaded, again, sent), strict=True):
            if isinstance(mine, torch.Tensor):
                torch.testing.assert_close(theirs, mine, atol=1e-12, rtol=0)
            else:
                assert torch.equal(mine["input_ids"], theirs["input_ids"])


def test_generation_of_hashes_reads_back_as_the_original_text():
    tokenizer, model = TOKENIZERS["llama"], model_of("llama", "ForCausalLM")
    adapted, server, _ = adapt(model, tokenizer, KEY, glide_steps=0)
    client = SentinelTokenizer(tokenizer, KEY)
    how = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **how)[0]
    got = adapted.generate(**server(client.encrypt(TEXTS[0]), return_tensors="pt"), **how)
    assert client.restore_ids(got)[0].tolist() == expected.tolist()
    for ids in (got, got.numpy(), list(got), got.tolist()):
        assert client.decrypt_ids(ids) == [tokenizer.decode(expected, skip_special_tokens=True)]
    assert client.decrypt_ids(got) == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_types_with_a_forced_tokenizer_class_load_as_a_plain_fast_tokenizer(tmp_path):
    # AutoTokenizer would make a Qwen2Tokenizer of it, which cannot look hashes up
    tokenizer = tokenizer_of("qwen2")
    model, server, _ = adapt(model_of("qwen2"), tokenizer, KEY)
    model.save_pretrained(tmp_path)
    server.save_pretrained(tmp_path)
    client = SentinelTokenizer(tokenizer, KEY)
    client.check(PreTrainedTokenizerFast.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_saved_files_hold_no_readable_word(kind, tmp_path):
    tokenizer = copy.deepcopy(TOKENIZERS[kind])
    tokenizer.chat_template = "You are a helpful film critic. {{ messages }}"
    tokenizer.add_tokens(["tenant-name"])
    model = model_of(kind)
    model.resize_token_embeddings(len(tokenizer))
    adapted, server, _ = adapt(model, tokenizer, KEY)
    adapted.save_pretrained(tmp_path)
    server.save_pretrained(tmp_path)
    saved = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix != ".safetensors")
    for word in ("film", "story", "good", "##", "Ġ", "▁", "tenant", "critic", PASSKEY):
        assert word not in saved, word
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    assert layout["normalizer"] is None
    assert "merges" not in layout["model"]
    assert {p.name for p in tmp_path.iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    }  # fmt: skip
    # neither may the order of the file tell the original order
    order = list(layout["model"]["vocab"].values())
    assert order == sorted(order)


def test_in_place_and_copy_agree_and_training_goes_on():
    model, tokenizer = model_of("bert", "ForSequenceClassification", dtype=torch.float32), TOKENIZERS["bert"]
    apart, _, _ = adapt(model, tokenizer, KEY)
    embedding = model.get_input_embeddings().weight
    same, server, _ = adapt(model, tokenizer, KEY, inplace=True)
    assert same is model
    assert model.get_input_embeddings().weight is embedding  # an optimizer made before still has it
    assert same_state(model, state(apart))
    sent = SentinelTokenizer(tokenizer, KEY).encrypt_batch(toy_reviews(4, 0)[0])
    model(**server(sent, return_tensors="pt", padding=True), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_training_without_glides_is_the_original_training_step_for_step(kind):
    tokenizer = TOKENIZERS[kind]
    model = model_of(kind, "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    adapted, server, _ = adapt(model, tokenizer, KEY, glide_steps=0)
    texts, labels = toy_reviews(16, 1)
    before = answers(model, tokenizer, [texts])[1]
    for net, tok, data in ((model, tokenizer, texts), (adapted, server, CLIENTS[kind].encrypt_batch(texts))):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            net(**tok(data, return_tensors="pt", padding=True), labels=labels).loss.backward()
            optimizer.step()
    same_answers(model, adapted, tokenizer, server, CLIENTS[kind], [texts], tolerance=1e-7)
    assert (answers(model, tokenizer, [texts])[1] - before).abs().max() > 1e-3


def test_trainer_fine_tunes_on_a_hashed_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = TOKENIZERS["bert"]
    base, _ = toy_model("bert", "ForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, server, _ = adapt(base, tokenizer, KEY)
    client = SentinelTokenizer(tokenizer, KEY)
    texts, labels = toy_reviews(64, 5)
    table = datasets.Dataset.from_dict({"text": texts, "label": labels.tolist()})
    hashed = encrypt_dataset(table, ["text"], client)
    assert hashed["text"] == client.encrypt_batch(texts)
    assert hashed["label"] == table["label"]
    ready = hashed.map(lambda rows: server(rows["text"]), batched=True)
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=80, learning_rate=3e-3, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, train_dataset=ready, data_collator=transformers.DataCollatorWithPadding(server)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[:3]) > 0.6
    assert np.mean(losses[-8:]) < 0.4


def test_datasets_of_pairs_words_and_splits():
    datasets = pytest.importorskip("datasets")
    client = SentinelTokenizer(TOKENIZERS["bert"], KEY)
    table = datasets.Dataset.from_dict({"a": ["good"], "b": ["bad film"], "words": [["what", "a"]], "tags": [[0, 1]]})
    both = encrypt_dataset(datasets.DatasetDict(train=table, test=table), ["a", "b", "words"], client)
    assert set(both) == {"train", "test"}
    assert both["test"][0] == {
        "a": client.encrypt("good"), "b": client.encrypt("bad film"), "words": client.encrypt(["what", "a"]),
        "tags": [0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no column 'c'; the dataset has \['a', 'b', 'words', 'tags'\]"):
        encrypt_dataset(table, ["c"], client)
    with pytest.raises(ValueError, match="num_proc must be 1"):
        encrypt_dataset(table, ["a"], client, num_proc=2)
    for fields in ("a", []):
        with pytest.raises(ValueError, match="must be a sequence of column names"):
            encrypt_dataset(table, fields, client)
    with pytest.raises(ValueError, match="batched is on already"):
        encrypt_dataset(table, ["a"], client, batched=False)
    assert list(encrypt_dataset(table.to_iterable_dataset(), ["a"], client)) == [
        {**table[0], "a": client.encrypt("good")}
    ]


def test_models_that_do_not_fit_are_refused_and_left_alone(without_shape_checks):
    tokenizer, small = TOKENIZERS["bert"], model_of("bert")
    before = state(small)

    def refused(words, model, *arguments, tok=tokenizer, **how):
        with pytest.raises(ValueError, match=words):
            adapt(model, tok, KEY, *arguments, inplace=True, **how)

    refused("glide_steps must be a whole number from 0, got -1", small, -1)
    refused("glide_steps", small, 1.5)
    refused("directions must be", small, directions="up")
    refused("translation must be", small, translation=-1.0)
    refused("translation must be", small, translation=float("nan"))
    refused("translation must be", small, translation=True)
    with pytest.raises(TypeError, match="shuffle must be True or False, got 'no'"):
        adapt(small, tokenizer, KEY, shuffle="no", inplace=True)
    for name, value in (("suppress_tokens", [40]), ("bad_words_ids", [[40]])):
        causal = model_of("llama", "ForCausalLM")
        setattr(causal.generation_config, name, value)
        refused(f"generation_config.{name} holds ids", causal, tok=TOKENIZERS["llama"])
    broken = model_of("bert")
    broken.get_input_embeddings().weight.data[7, 3] = float("nan")
    refused("not finite", broken)
    refused("get_input_embeddings", torch.nn.Linear(3, 3))
    vit = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    refused("get_input_embeddings", transformers.ViTModel(vit))
    refused(r"ids up to \d+, but the model's embedding has 20 rows", model_of("bert", vocab_size=20))
    small.config.eos_token_id = len(tokenizer) - 1
    refused("eos_token_id is .* not a special token", small)
    small.config.eos_token_id = None
    small.register_buffer("counts", torch.zeros(small.config.vocab_size))
    refused("unsupported architecture.*'counts'", small)
    del small.counts
    assert same_state(small, before)
    t5 = model_of("t5", "ForSeq2SeqLM")
    before = state(t5)
    refused("encoder and decoder share", t5)
    assert same_state(t5, before)
    assert adapt(t5, tokenizer, KEY, 0)[2].head == "tied"
    quantized = model_of("bert")
    quantized.get_input_embeddings().weight = torch.nn.Parameter(
        torch.zeros(quantized.config.vocab_size, 16, dtype=torch.int8), requires_grad=False
    )
    refused("floating-point", quantized)


# --- attacks


def table_and_copy(steps=2, size=400, width=24, directions="random"):
    rows = torch.randn(size, width, dtype=torch.float64) * torch.linspace(0.3, 2, width)
    order = torch.randperm(size)
    lines, shifts = map(torch.from_numpy, KEY.directions(directions, steps, width))
    return rows, permuted_rows(glide(rows, lines, 3 * shifts), order), order


def test_every_geometric_attack_against_what_it_must_find():
    torch.manual_seed(0)
    rows, moved, order = table_and_copy()
    for metric in ("l2", "cosine", "centered", "gram", "procrustes"):
        found = recovery_attack(rows, permuted_rows(rows, order), order, metric=metric)
        assert found[1] == 1.0, metric  # nothing was moved
    for metric in ("gram", "procrustes"):
        assert recovery_attack(rows, moved, order, metric=metric, known_pairs=30)[1] == 1.0, metric
    # a plain search by L2 is led astray by the translation, which taking out the mean undoes
    plain, centered = (recovery_attack(rows, moved, order, metric=m)[1] for m in ("l2", "centered"))
    assert plain < 0.4 < 0.8 < centered
    # unrelated tables: by luck alone
    noise = torch.randn_like(rows)
    for metric in ("l2", "cosine", "centered", "gram", "procrustes"):
        assert recovery_attack(rows, noise, order, k=(1, 10), metric=metric)[10] < 0.12, metric


def test_recovery_counts_ranks_as_a_loop_would():
    torch.manual_seed(1)
    rows, moved, order = table_and_copy(size=60, width=6)
    k = (1, 3, 7)
    expected = dict.fromkeys(k, 0.0)
    for i in range(60):
        nearest = (rows.float() - moved[order[i]].float()).norm(dim=1).argsort().tolist()
        for n in k:
            expected[n] += (i in nearest[:n]) / 60
    assert recovery_attack(rows, moved, order, k=k) == pytest.approx(expected)


def test_fingerprints_are_diagonals_of_powers_of_the_gram_matrix():
    rows = torch.randn(12, 5, dtype=torch.float64)
    x = rows - rows.mean(0)
    gram = x @ x.T
    top = torch.linalg.eigvalsh(gram)[-1]
    naive = torch.stack([torch.linalg.matrix_power(gram, p + 1).diagonal() / top**p for p in range(4)], -1)
    torch.testing.assert_close(gram_fingerprint(rows, 4), naive.log())


def test_attacks_take_models_and_refuse_nonsense(without_shape_checks):
    tokenizer, model = TOKENIZERS["bert"], model_of("bert")
    adapted, _, _ = adapt(model, tokenizer, KEY)
    order = SentinelTokenizer(tokenizer, KEY).permutation
    assert recovery_attack(model, adapted, order, metric="procrustes", known_pairs=20)[1] > 0.95
    with pytest.raises(ValueError, match="metric must be one of"):
        recovery_attack(model, adapted, order, metric="l3")
    with pytest.raises(ValueError, match="one shape"):
        recovery_attack(torch.zeros(3, 2), torch.zeros(4, 2), order)
    with pytest.raises(ValueError, match="k must hold"):
        recovery_attack(model, adapted, order, k=(0, 1))
    with pytest.raises(ValueError, match="known_pairs must be"):
        recovery_attack(model, adapted, order, metric="procrustes", known_pairs=10**6)
    with pytest.raises(TypeError, match="base_model must be a model or its embedding matrix"):
        recovery_attack("model", adapted, order)
    # not finite numbers are near to everything: without the check all rows would count as found
    with pytest.raises(ValueError, match="adapted_model must be a matrix of finite numbers"):
        recovery_attack(torch.randn(9, 2), torch.full((9, 2), float("nan")), torch.arange(9))
    for truth in (torch.arange(10), torch.tensor([0, -1]), torch.tensor([0, 0]), torch.arange(3.0)):
        with pytest.raises(ValueError, match="truth"):
            recovery_attack(torch.randn(9, 2), torch.randn(9, 2), truth)
    with pytest.raises(ValueError, match="sample must be at least 1"):
        recovery_attack(model, adapted, order, sample=0)
    client = SentinelTokenizer(tokenizer, KEY)
    for attack in (known_plaintext_attack, frequency_attack):
        with pytest.raises(TypeError, match="must be a sequence of texts, got str"):
            attack(client, "a film", client.encrypt_batch(["a film"]))
        with pytest.raises(ValueError, match="is empty"):
            attack(client, [], client.encrypt_batch(["a film"]))
        with pytest.raises(TypeError, match="must be a SentinelTokenizer"):
            attack(tokenizer, ["a film"], ["a film"])


def test_known_plaintext_reads_what_it_has_seen():
    client = SentinelTokenizer(TOKENIZERS["bert"], KEY)
    traffic = client.encrypt_batch(["good film good", "bad film"])
    found = known_plaintext_attack(client, ["a good film"], traffic)
    assert found.tokens == pytest.approx(4 / 5)
    assert found.types == pytest.approx(2 / 3)
    assert sorted(found.guesses.values()) == ["a", "film", "good"]
    assert found.guesses[client.encrypt("good")] == "good"
    assert known_plaintext_attack(client, ["story"], traffic).tokens == 0
    with pytest.raises(ValueError, match="holds no hash of this client"):
        known_plaintext_attack(client, ["story"], ["good film"])


def test_frequencies_match_by_rank():
    client = SentinelTokenizer(TOKENIZERS["bert"], KEY)
    public = ["a a a a", "film film film", "good good", "bad"]
    traffic = client.encrypt_batch(["a film a good a film"])
    found = frequency_attack(client, public, traffic)
    assert found.tokens == found.types == 1
    assert frequency_attack(client, ["film film film a a good"], traffic).tokens == pytest.approx(1 / 6)


# --- the real models


@pytest.fixture(scope="module")
def minilm():
    try:
        return zoo.load("minilm")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))


def test_minilm_reads_hashes_as_it_reads_words(minilm):
    model, tokenizer = minilm
    client = SentinelTokenizer(tokenizer, KEY)
    random.seed(0)
    texts = [" ".join(random.sample(toy_reviews(20, 0)[0], 2)), "Pneumonoultramicroscopic café №5 😀 [SEP] ok", "x"]
    adapted, server, _ = adapt(model, tokenizer, KEY, directions="official")
    same_answers(model, adapted, tokenizer, server, client, [texts], tolerance=1e-4)
    known = list(tokenizer.get_vocab())
    many = [" ".join(random.choices(known, k=8)) for _ in range(1000)]
    plain, sent = tokenizer(many)["input_ids"], server(client.encrypt_batch(many))["input_ids"]
    assert [client.permutation[torch.tensor(row)].tolist() for row in plain] == sent
    stolen = adapt(model, tokenizer, KEY)[0]
    assert recovery_attack(model, stolen, client.permutation, sample=100, metric="centered")[1] > 0.95
