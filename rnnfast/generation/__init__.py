"""Sequences of tokens from a recurrent language model: sampling and beam search."""

from .beams import Beams, beam_search
from .sampling import Generated, generate

__all__ = ["Beams", "Generated", "beam_search", "generate"]
