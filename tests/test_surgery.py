import copy

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchgraft.surgery import NothingMatchedError, find, replace

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
MODELS = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=40)), nn.LayerNorm, 5),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)),
        transformers.pytorch_utils.Conv1D, 8,
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=40)),
        "*mlp.act_fn", 2,
    ),
}  # fmt: skip


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def build(name):
    torch.manual_seed(0)
    make, target, count = MODELS[name]
    return make().eval(), target, count


@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_change_and_come_back(name):
    model, target, count = build(name)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids)[0]
        report = replace(model, target, Twice)
        assert len(report.replaced) == count
        during = model(ids)[0]
        assert during.shape == before.shape
        assert not torch.allclose(during, before)
        report.undo()
        assert torch.equal(model(ids)[0], before)


@pytest.mark.parametrize("name", list(MODELS))
def test_replacing_by_a_copy_changes_no_output(name):
    model, target, _ = build(name)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids)[0]
        with replace(model, target, copy.deepcopy):
            assert torch.equal(model(ids)[0], before)


def test_a_shared_module_is_made_once_and_put_everywhere():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([nn.ReLU(), shared])})
    made = []
    report = replace(model, nn.Linear, lambda old: made.append(old) or nn.Linear(3, 3))
    assert len(made) == 1
    assert model["a"] is model["b"][1] is report.replaced[0].new
    assert report.replaced[0].names == ("a", "b.1")
    report.undo()
    assert model["a"] is model["b"][1] is shared


def test_tied_weights_stay_tied_or_are_named():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    with replace(model, "lm_head", Twice) as report:
        assert model.lm_head.inner.weight is model.transformer.wte.weight
        assert report.untied == ()
    with replace(model, "lm_head", copy.deepcopy) as report:
        assert report.untied == (("lm_head.weight", "transformer.wte.weight"),)
        assert "no longer tied" in str(report)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dtype_device_and_training_flag_are_kept():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16).train()
    model[1].eval()
    replace(model, nn.Linear, lambda old: nn.Linear(2, 2).eval())
    replace(model, nn.BatchNorm1d, lambda old: nn.BatchNorm1d(2))
    assert model[0].weight.dtype == model[1].weight.dtype == torch.bfloat16
    assert (model[0].training, model[1].training) == (True, False)
    assert model[1].num_batches_tracked.dtype == torch.int64
    on_meta = nn.Sequential(nn.Linear(2, 2)).to("meta")
    replace(on_meta, nn.Linear, lambda old: nn.Linear(2, 2))
    assert on_meta[0].weight.device.type == "meta"


def test_hooks_go_along_and_fire_once():
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    report = replace(model, nn.Linear, lambda old: nn.Linear(2, 2))
    model(torch.randn(1, 2)).sum().backward()
    assert calls == ["before", "after", "backward"]
    report.undo()
    calls.clear()
    handle.remove()
    model(torch.randn(1, 2))
    assert calls == ["before"]


def test_a_replacement_in_a_shared_place_stays_tied():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert replace(model, nn.Linear, lambda old: nn.Bilinear(2, 2, 2)).untied == ()


def test_a_wrapped_module_calls_its_hooks_once():
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    replace(model, nn.Linear, Twice)
    model(torch.randn(1, 2)).sum().backward()
    assert calls == ["after", "backward"]


def test_a_hook_can_be_removed_after_the_replacement_and_joins_those_of_the_new_module():
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("old"))
    replace(model, nn.Linear, lambda old: nn.Linear(2, 2))
    handle.remove()
    model(torch.randn(1, 2))
    assert calls == []
    model[0].register_forward_hook(lambda *_: calls.append("old"))

    def make(old):
        new = nn.Linear(2, 2)
        new.register_forward_hook(lambda *_: calls.append("new"))
        return new

    report = replace(model, nn.Linear, make)
    model(torch.randn(1, 2))
    assert calls == ["new", "old"]
    report.undo()
    model(torch.randn(1, 2))
    assert calls == ["new", "old", "old"]


class Mixed(nn.Module):
    """Holds the old module, one of its parameters, and tensors of its own."""

    def __init__(self, old, kind=torch.float32):
        super().__init__()
        self.old, self.weight = old, old.weight
        self.own = nn.Parameter(torch.ones(2, dtype=torch.float32))
        self.same = self.own
        self.register_buffer("scale", torch.ones(2, dtype=kind))
        self.register_buffer("codes", torch.ones(2, dtype=torch.int8))


def test_what_a_wrapper_holds_of_the_old_module_is_not_converted():
    old = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    old[1].float()
    old.weight = old[0].weight
    weights = [p.detach().clone() for p in old.parameters()]
    model = nn.ModuleDict({"part": old})
    report = replace(model, "part", Mixed)
    assert model["part"].own.dtype == model["part"].scale.dtype == torch.bfloat16
    assert model["part"].own is model["part"].same
    assert model["part"].codes.dtype == torch.int8
    for now, before in zip(old.parameters(), weights, strict=True):
        assert now.dtype == before.dtype
        assert torch.equal(now, before)
    report.undo()
    replace(model, "part", lambda old: Mixed(old, torch.float64))
    assert (model["part"].own.dtype, model["part"].scale.dtype) == (torch.float32, torch.float64)


def test_a_wrapper_on_meta_keeps_ties_and_data_elsewhere_is_refused():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    replace(model, nn.Linear, Mixed)
    assert model[0].own.is_meta
    assert model[0].own is model[0].same
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = list(model)
    made = iter([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    with pytest.raises(ValueError, match="on the meta device for a module on cpu"):
        replace(model, nn.Linear, lambda old: next(made))
    assert list(model) == before


def test_a_module_without_numbers_takes_the_dtype_of_what_is_around_it():
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.ReLU()))
    replace(model, nn.ReLU, lambda old: nn.PReLU())
    assert model[1][1].weight.dtype == torch.bfloat16
    lonely = nn.Sequential(nn.ReLU())
    replace(lonely, nn.ReLU, lambda old: nn.PReLU().double())
    assert lonely[0].weight.dtype == torch.float64


def test_undo_follows_the_mode_that_the_model_is_in():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    with replace(model, nn.Sequential, lambda old: nn.Sequential(nn.BatchNorm1d(2))):
        model.eval()
    assert not any(module.training for module in model.modules())


def test_a_module_that_holds_itself_is_entered_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    model[0]._modules["around"] = model
    assert [match.names for match in find(model, nn.Linear)] == [("0.0",)]


def test_a_union_of_types_is_a_target_and_lazy_modules_are_described():
    model = nn.Sequential(nn.LazyLinear(2), nn.ReLU())
    assert len(find(model, nn.ReLU | nn.LazyLinear)) == 2
    assert str(replace(model, nn.LazyLinear, copy.deepcopy)) == "0: LazyLinear -> LazyLinear, 0 -> 0 parameters"


def test_a_function_is_not_asked_about_the_model_itself():
    with pytest.raises(NothingMatchedError, match="it has Linear"):
        replace(nn.Sequential(nn.Linear(1, 1)), lambda name, module: name[0] == "x", copy.deepcopy)


def test_matches_inside_a_match_are_left_alone():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))))
    assert [m.names for m in find(model, nn.Sequential)] == [("0",)]
    assert [m.names for m in find(model, (nn.Linear, nn.ReLU))] == [("0.0",), ("0.1.0",)]
    assert [m.names for m in find(model, lambda name, module: name.endswith("1"))] == [("0.1",)]


def test_a_failing_make_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    before = list(model)

    def make(old):
        if old is before[1]:
            raise RuntimeError("no")
        return nn.Linear(1, 1)

    with pytest.raises(RuntimeError, match="no"):
        replace(model, nn.Linear, make)
    assert list(model) == before
    with pytest.raises(TypeError, match="make must return"):
        replace(model, nn.Linear, lambda old: 3)
    assert list(model) == before


def test_nothing_matched_says_what_there_is():
    with pytest.raises(NothingMatchedError, match=r"Conv2d; it has Linear \(2\)"):
        replace(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Conv2d, copy.deepcopy)
    with pytest.raises(NothingMatchedError, match="only the model itself"):
        replace(nn.Linear(1, 1), nn.Linear, copy.deepcopy)


def test_undo_is_refused_where_it_would_not_restore():
    model = nn.Sequential(nn.ReLU())
    first = replace(model, nn.ReLU, lambda old: nn.GELU())
    second = replace(model, nn.GELU, lambda old: nn.Tanh())
    with pytest.raises(RuntimeError, match="replaced again"):
        first.undo()
    second.undo()
    first.undo()
    with pytest.raises(RuntimeError, match="already"):
        first.undo()
    assert isinstance(model[0], nn.ReLU)


def test_undo_says_so_when_what_held_the_module_is_gone():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    report = replace(model, nn.ReLU, lambda old: nn.GELU())
    model[0] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"'0\.0' was replaced again"):
        report.undo()


def test_an_error_inside_a_context_is_not_hidden_by_a_failing_undo():
    model = nn.Sequential(nn.ReLU())

    def spoil():
        with replace(model, nn.ReLU, lambda old: nn.GELU()):
            model[0] = nn.Tanh()
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        spoil()
    assert "could not be undone" in caught.value.__notes__[0]


def test_a_context_undoes_after_an_exception():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(KeyError), replace(model, nn.ReLU, lambda old: nn.GELU()):
        raise KeyError
    assert isinstance(model[0], nn.ReLU)


@pytest.mark.parametrize("target", [3, (), (3,), int])
def test_wrong_targets(without_shape_checks, target):
    with pytest.raises(TypeError, match="target must be"):
        find(nn.Sequential(), target)


def trees(depth=3):
    leaves = st.sampled_from(["linear", "relu", "shared"])
    return st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8)


@given(trees())
def test_replace_and_undo_is_the_identity_on_any_tree(tree):
    shared = nn.Linear(2, 2)

    def grow(node):
        if isinstance(node, list):
            return nn.Sequential(*map(grow, node))
        return {"linear": nn.Linear(2, 2), "relu": nn.ReLU(), "shared": shared}[node]

    model = nn.Sequential(grow(tree))
    x = torch.randn(3, 2)
    before = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    y = model(x)
    if not find(model, nn.Linear):
        return
    report = replace(model, nn.Linear, copy.deepcopy)
    assert torch.equal(model(x), y)
    assert not any(m is shared for m in model.modules())
    report.undo()
    assert {name: id(m) for name, m in model.named_modules(remove_duplicate=False)} == before
