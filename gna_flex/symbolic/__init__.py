"""The symbolic analyzer: proofs of perfect block-sparsity, and which GNA a foreign mask is."""

from gna_flex.symbolic.lemmas import LEMMAS, Lemma
from gna_flex.symbolic.neighborhood import SymbolicGNA
from gna_flex.symbolic.proof import Proof, Refutation
from gna_flex.symbolic.prove import prove
from gna_flex.symbolic.recognise import Recognition, recognise
from gna_flex.symbolic.remedies import Remedy
from gna_flex.symbolic.solve import Solution, solve
from gna_flex.symbolic.witness import Witness

__all__ = [
    "LEMMAS",
    "Lemma",
    "Proof",
    "Recognition",
    "Refutation",
    "Remedy",
    "Solution",
    "SymbolicGNA",
    "Witness",
    "prove",
    "recognise",
    "solve",
]
