"""A language model as the loops over tokens see it."""

from __future__ import annotations

import operator
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module

from ..nn.layers import Recurrent
from ..stack import checks, precision

__all__ = ["LanguageModel"]


class LanguageModel(NamedTuple):
    """The modules of a model, and whether the native loops take them."""

    embedding: Any
    rnn: Any
    head: Any

    @property
    def classes(self) -> int:
        return int(self.head.out_features)

    def check(self, prompt: Tensor, steps: int, stop: int | None) -> None:
        """Raise an exception where the modules, the prompt or a number do not fit."""
        for name, part, expected, attribute in (
            ("embedding", self.embedding, "torch.nn.Embedding", "num_embeddings"),
            ("rnn", self.rnn, "RNN, LSTM or GRU", "bidirectional"),
            ("head", self.head, "torch.nn.Linear", "out_features"),
            ("prompt", prompt, "torch.Tensor", "requires_grad"),
        ):
            if not hasattr(part, attribute) and (part is not None or name != "embedding"):
                raise TypeError(f"{name} is a {type(part).__name__}; expected a {expected}")
        if self.rnn.bidirectional:
            raise ValueError("rnn is bidirectional; a model that generates has one direction")
        classes = self.classes
        inputs = classes if self.embedding is None else self.embedding.embedding_dim
        if self.embedding is not None and self.embedding.num_embeddings != classes:
            raise ValueError(
                f"embedding has {self.embedding.num_embeddings} tokens, and head has {classes}"
            )
        if inputs != self.rnn.input_size:
            what = "one-hot inputs have" if self.embedding is None else "embedding has"
            raise ValueError(f"{what} {inputs} features; rnn has input_size {self.rnn.input_size}")
        outputs = self.rnn.proj_size or self.rnn.hidden_size
        if self.head.in_features != outputs:
            raise ValueError(
                f"head has in_features {self.head.in_features}; "
                f"the outputs of rnn have {outputs} features"
            )
        if prompt.dim() != 2 or prompt.size(1) < 1 or prompt.dtype != torch.int64:
            raise ValueError(
                f"prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; "
                "expected (B, P) with P >= 1 and torch.int64"
            )
        if operator.index(steps) < 0:
            raise ValueError(f"steps is {steps}; expected at least 0")
        if stop is not None and not 0 <= operator.index(stop) < classes:
            raise ValueError(f"stop is {stop}; expected a token in range({classes})")
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < classes:
            raise IndexError(
                f"prompt has tokens from {int(prompt.min())} to {int(prompt.max())}; "
                f"expected tokens in range({classes})"
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """The inputs of ``rnn`` for tokens of any shape."""
        if self.embedding is not None:
            embedded: Tensor = self.embedding(tokens)
            return embedded
        return F.one_hot(tokens, self.classes).to(self.head.weight.dtype)

    def read(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The last output [B, R] and the states after the tokens [B, P]."""
        x = self.embed(tokens)
        y, state = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1), state)
        return (y[:, -1] if self.rnn.batch_first else y[-1]), state

    def runs_natively(self, function: str) -> bool:
        """Whether the native loop takes the model; if not, a warning says why."""
        reason = self.why_not()
        if reason:
            warnings.warn(f"rnnfast.{function} runs in Python: {reason}", stacklevel=3)
        return not reason

    def why_not(self) -> str | None:
        """Why the native loop does not take the model; None if it does."""
        rnn, head, embedding = self.rnn, self.head, self.embedding
        if not isinstance(rnn, Recurrent) or type(rnn).forward is not Recurrent.forward:
            return f"rnn is a {type(rnn).__module__}.{type(rnn).__qualname__}"
        if type(head) is not nn.Linear:
            return f"head is a {type(head).__qualname__}, not a torch.nn.Linear"
        if embedding is not None and (
            type(embedding) is not nn.Embedding or embedding.max_norm is not None
        ):
            return "embedding is not a plain torch.nn.Embedding"
        modules = [m for m in (rnn, head, embedding) if m is not None]
        if any("forward" in m.__dict__ for m in modules):
            return "the forward of a module was replaced"
        if any(m._forward_hooks or m._forward_pre_hooks for m in modules) or (
            module._global_forward_hooks or module._global_forward_pre_hooks
        ):
            return "a module has hooks"
        if rnn.training and rnn.dropout > 0 and rnn.num_layers > 1:
            return "rnn applies dropout in training mode; call eval()"
        tensors = [*self.weights(), head.weight]
        tensors += [] if head.bias is None else [head.bias]
        tensors += [] if embedding is None else [embedding.weight]
        if not all(
            type(t) in checks.PLAIN_TYPES and t.is_cpu and t.layout == torch.strided for t in tensors
        ):
            return "a weight is not a plain tensor on the CPU"
        if len({t.dtype for t in tensors}) > 1 or head.weight.dtype not in checks.DTYPES:
            return f"the weights have the dtypes {sorted({str(t.dtype) for t in tensors})}"
        if precision.autocasts() or not checks.plain_call():
            return "autocast, a transform, a mode or torch.compile is active"
        return None

    def weights(self) -> list[Any]:
        """The weights of ``rnn``, in torch's order; None for one that a parametrization computes."""
        return [self.rnn._parameters.get(name) for name in self.rnn._flat_weights_names]

    def tensors(self) -> tuple[Any, ...]:
        """The tensors of the model as the extension takes them."""

        def memory(t: Tensor | None) -> Tensor | None:
            return None if t is None else checks.readable(t.detach())

        embedding = None if self.embedding is None else self.embedding.weight
        weights = [memory(w) for w in self.weights()]
        return weights, memory(embedding), memory(self.head.weight), memory(self.head.bias)

    def states(self, y: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copies of y, h and c, which the extension overwrites."""
        h, c = state if isinstance(state, tuple) else (state, None)

        def copy(t: Tensor) -> Tensor:
            return t.clone(memory_format=torch.contiguous_format)

        return copy(y), copy(h), None if c is None else copy(c)

    def scores(self, y: Tensor, needed: Tensor, step: int) -> Tensor:
        """The scores of all tokens, float64 on the CPU; checks those of the rows that are needed."""
        scores: Tensor = self.head(y).cpu().double()
        if not scores.logsumexp(-1).isfinite()[needed].all():
            raise RuntimeError(
                f"the scores of a row at step {step} contain NaN or inf, or all of them are -inf"
            )
        return scores

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The output ``[B, R]`` and the states after one token of each row, ``[B]``."""
        return self.read(tokens[:, None], state)
