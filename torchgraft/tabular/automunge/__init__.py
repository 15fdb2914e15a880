"""Parsed categoric encodings (Teague, "Parsed Categoric Encodings with Automunge", 2022, arXiv 2202.09498).

Entries of a text column often have structure: ``PC 17599``, ``Mac OS X 10_11_6``. These encodings compare the distinct
entries of training and turn what they share, or the numbers in them, into columns. All are scikit-learn transformers.
"""

from torchgraft.tabular.automunge.auto import TabularTensors, TabularTorch, auto_encode
from torchgraft.tabular.automunge.encoders import (
    BinaryCode,
    EntryMerger,
    FrequencyOrdinal,
    StringOverlapEncoder,
    SubstringSearchEncoder,
    TextExtractor,
    UpperCase,
    WordHasher,
)
from torchgraft.tabular.automunge.numbers import NumberExtractor, find_number
from torchgraft.tabular.automunge.overlaps import OverlapKeys, find_overlaps, find_whole_overlaps
from torchgraft.tabular.automunge.trees import CATEGORIES, FAMILY_TREES, PRIMITIVES, FamilyTree

__all__ = [
    "CATEGORIES",
    "FAMILY_TREES",
    "PRIMITIVES",
    "BinaryCode",
    "EntryMerger",
    "FamilyTree",
    "FrequencyOrdinal",
    "NumberExtractor",
    "OverlapKeys",
    "StringOverlapEncoder",
    "SubstringSearchEncoder",
    "TabularTensors",
    "TabularTorch",
    "TextExtractor",
    "UpperCase",
    "WordHasher",
    "auto_encode",
    "find_number",
    "find_overlaps",
    "find_whole_overlaps",
]
