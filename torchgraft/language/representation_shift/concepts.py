"""Concepts: directions or centres that hidden states are made of, and the words and samples that they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, DictionaryLearning, sparse_encode
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.metrics import pairwise_distances
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchgraft.language.representation_shift.states import StateSet, _plain

Method = Literal["kmeans", "seminmf", "pca", "simple"]
METHODS: tuple[Method, ...] = ("kmeans", "seminmf", "pca", "simple")
WordFilter = Callable[[str], bool] | Collection[str]


class ConceptDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Concept vectors of hidden states, ``X ~ V U``; a scikit-learn transformer from states to activations V.

    Khayatan et al. (section 3), after CoX-LMM.

    - ``kmeans``, of the paper's analysis of shifts: U are centres, V = 1 / (1 + distance).
    - ``seminmf``: scikit-learn's ``DictionaryLearning`` with non-negative codes, solved by coordinate descent. Its
      concepts have length 1, so that a shift in the units of the states is long beside them.
    - ``pca``: principal axes, of length 1 too, and scores about the mean. An axis has no sign of its own, and a state
      belongs to the axis of its greatest score, not of its greatest absolute one; scikit-learn's choice of signs,
      which the official code takes too, may differ between two sets of states.
    - ``simple``: the K states of greatest norm; activations as of ``kmeans``.

    Differs from the official code in that activations of training data are those that ``transform`` gives: for
    ``seminmf`` the official ones are the last codes of training, which belong to the dictionary before its last update.

    Args:
        n_concepts: K.
        method: one of the above.
        max_iter: of ``kmeans`` and ``seminmf``.
        alpha: of ``seminmf``, the price of a code's absolute value.
        random_state: as in scikit-learn.

    Attributes:
        components_: (K, D), U.
        activations_: (N, K) of the training data.
        mean_: (D,) of the training data.
        n_iter_: steps that ``kmeans`` or ``seminmf`` took.

    Raises:
        TypeError: for a StateSet instead of its states.
        ValueError: in ``fit``, for an unknown method, fewer states than concepts, or ``pca`` with more concepts than
            features.

    Example:
        >>> dictionary = ConceptDictionary(2, random_state=0).fit([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> dictionary.assign([[1.0, 1.0], [8.0, 8.0]]).tolist() == dictionary.assign([[0, 1], [9, 9]]).tolist()
        True
    """

    def __init__(
        self,
        n_concepts: int = 20,
        method: Method = "kmeans",
        *,
        max_iter: int = 1000,
        alpha: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_concepts = n_concepts
        self.method = method
        self.max_iter = max_iter
        self.alpha = alpha
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> ConceptDictionary:
        """Find the concepts of states (N, D), an array or a tensor."""
        x = validate_data(self, _array(X), dtype=[np.float64, np.float32])
        self.n_iter_ = 1
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.n_concepts < 1 or self.n_concepts > len(x):
            raise ValueError(f"n_concepts must be in 1..n_samples, got {self.n_concepts} for n_samples = {len(x)}")
        if self.method == "kmeans":
            model = KMeans(self.n_concepts, max_iter=self.max_iter, random_state=self.random_state).fit(x)
            self.components_, self.n_iter_ = model.cluster_centers_, model.n_iter_
        elif self.method == "seminmf":
            self.components_, self.n_iter_ = self._learnt(x)
        elif self.method == "pca":
            if self.n_concepts > x.shape[1]:
                raise ValueError(f"pca finds at most {x.shape[1]} concepts of as many features, got {self.n_concepts}")
            self.components_ = PCA(self.n_concepts, random_state=self.random_state).fit(x).components_
        else:
            self.components_ = x[np.linalg.norm(x, axis=1).argsort()[-self.n_concepts :]]
        self.mean_ = x.mean(0)
        self.activations_ = self._activations(x, self.components_)
        return self

    def _learnt(self, x: np.ndarray) -> tuple[np.ndarray, int]:
        learner = DictionaryLearning(
            self.n_concepts, alpha=self.alpha, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd",
            max_iter=self.max_iter, random_state=self.random_state,
        )  # fmt: skip
        with warnings.catch_warnings():
            # concepts that the price keeps unused are drawn anew, which numpy may divide by zero in
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            # coordinate descent does not reach its tolerance in float32
            learner.fit(x.astype(np.float64))
        return learner.components_.astype(x.dtype), learner.n_iter_

    def _activations(self, x: np.ndarray, components: np.ndarray) -> np.ndarray:
        found: np.ndarray
        if self.method in ("kmeans", "simple"):
            found = 1 / (1 + pairwise_distances(x, components))
        elif self.method == "pca":
            found = (x - self.mean_) @ components.T
        else:
            x64, u64 = x.astype(np.float64), components.astype(np.float64)
            found = sparse_encode(x64, u64, algorithm="lasso_cd", alpha=self.alpha, positive=True, max_iter=1000)
        return found.astype(x.dtype, copy=False)

    def transform(self, X: Any) -> np.ndarray:
        """Activations (N, K) of states (N, D)."""
        check_is_fitted(self)
        x = validate_data(self, _array(X), dtype=[np.float64, np.float32], reset=False)
        return self._activations(x, self.components_)

    def activations(self, X: Any, concepts: Any) -> np.ndarray:
        """Activations (N, K') that other concepts (K', D), such as shifted ones, have in states (N, D)."""
        check_is_fitted(self)
        x = validate_data(self, _array(X), dtype=[np.float64, np.float32], reset=False)
        return self._activations(x, _array(concepts).astype(x.dtype, copy=False))

    def assign(self, X: Any) -> np.ndarray:
        """The concept (N,) that is most active in each state; for ``kmeans`` that of the nearest centre."""
        return self.transform(X).argmax(1)

    def ground_samples(self, k: int = 5) -> np.ndarray:
        """The k training states (K, k), as rows of X, in which each concept is most active; most active first.

        Raises:
            ValueError: for a k that is not in 1..N.
        """
        check_is_fitted(self)
        return most_activating(self.activations_, k)

    def ground_text(
        self,
        lm_head: nn.Module | Tensor,
        tokenizer: Any,
        k: int = 15,
        norm: nn.Module | None = None,
        vocabulary_filter: WordFilter | None = None,
    ) -> list[list[str]]:
        """Words that each concept stands for; see the function ``ground_text``."""
        check_is_fitted(self)
        return ground_text(self.components_, lm_head, tokenizer, k, norm, vocabulary_filter)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


def _array(x: Any) -> Any:
    if isinstance(x, StateSet):
        raise TypeError("X must be states (N, D), got a StateSet; take those of a layer by its method of(layer)")
    if not isinstance(x, Tensor):
        return x
    # numpy has no bfloat16
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32)).numpy()


def most_activating(activations: Any, k: int) -> np.ndarray:
    """Rows (K, k) of activations (N, K) that are greatest in each column, greatest first.

    Raises:
        ValueError: for a k that is not in 1..N.
    """
    found: np.ndarray = np.asarray(_array(activations))
    if not 1 <= k <= len(found):
        raise ValueError(f"k must be in 1..{len(found)}, got {k}")
    return np.argsort(-found, axis=0, kind="stable")[:k].T


def is_content_word(word: str) -> bool:
    """Whether a word has more than two letters, nothing but letters, and is not one of scikit-learn's stop words."""
    return len(word) > 2 and word.isascii() and word.isalpha() and word not in ENGLISH_STOP_WORDS


@torch.no_grad()
def ground_text(
    concepts: Any,
    lm_head: nn.Module | Tensor,
    tokenizer: Any,
    k: int = 15,
    norm: nn.Module | None = None,
    vocabulary_filter: WordFilter | None = None,
    *,
    candidates: int = 200,
) -> list[list[str]]:
    """Words that vectors of the hidden space stand for: the head's best tokens that are words.

    CoX-LMM (section 3). Differs from the official code in that a word counts once and begins with a space where the
    tokenizer marks one (pieces of words are left out), and that there is no list of dictionary words: bring yours.

    Args:
        concepts: (K, D).
        lm_head: the model's, or its weight (V, D).
        tokenizer: or processor.
        k: words for each concept, at most; fewer where the candidates hold fewer.
        norm: the final norm, for concepts of a layer before it; without it such vectors give junk.
        vocabulary_filter: a function of the word in lower case, or a collection of those to keep; by default words of
            more than two letters that are not stop words.
        candidates: how many of the best tokens are looked at.

    Returns:
        K lists of words in lower case, best first.

    Raises:
        ValueError: for concepts of another width than the head, or k above ``candidates``.
    """
    weight = lm_head if isinstance(lm_head, Tensor) else lm_head.weight
    assert isinstance(weight, Tensor)
    vectors = torch.as_tensor(np.asarray(_array(concepts))).to(weight)
    if vectors.dim() != 2 or vectors.shape[1] != weight.shape[1]:
        raise ValueError(f"concepts must be (K, {weight.shape[1]}), as wide as the head, got {tuple(vectors.shape)}")
    if not 1 <= k <= candidates:
        raise ValueError(f"k must be in 1..candidates = {candidates}, got {k}")
    if vocabulary_filter is None:
        keep: Callable[[str], bool] = is_content_word
    elif callable(vocabulary_filter):
        keep = vocabulary_filter
    else:
        keep = set(vocabulary_filter).__contains__
    vectors = vectors if norm is None else norm(vectors)
    logits = vectors @ weight.T if isinstance(lm_head, Tensor) else lm_head(vectors)
    plain = _plain(tokenizer)
    best = logits.float().topk(min(candidates, logits.shape[1]), -1).indices
    # pieces inside of words are told by the mark that whole words have; tokenizers without a mark keep all
    vocabulary = list(plain.get_vocab())
    marked = {mark for mark in ("Ġ", "▁") if any(token.startswith(mark) for token in vocabulary)}
    found = []
    for row in best.tolist():
        words: dict[str, None] = {}
        for token, name in zip(row, plain.convert_ids_to_tokens(row), strict=True):
            whole = not marked or (name is not None and name[:1] in marked)
            word = plain.decode([token], skip_special_tokens=True).strip().lower()
            if whole and word and keep(word):
                words[word] = None
            if len(words) == k:
                break
        found.append(list(words))
    return found


def word_overlap(a: Sequence[Collection[Any]], b: Sequence[Collection[Any]]) -> np.ndarray:
    """How many entries each pair of lists has in common, (K,).

    Raises:
        ValueError: for different numbers of lists.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must be equally many lists, got {len(a)} and {len(b)}")
    return np.array([len(set(x) & set(y)) for x, y in zip(a, b, strict=True)])
