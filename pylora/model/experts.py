"""A mixture of experts in the place of a feed-forward part: a router picks a few for each token.

y = sum over the chosen experts of weight * down(act(gate(x)) * up(x)); the weights are the softmax
of the router's logits, of the chosen ones alone where the family says so. Experts run one after the
other, each on its tokens. The experts are frozen, and so is the router unless it is trained itself;
backward goes through both, the choice itself having no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pylora.model.config import LlamaConfig
from pylora.model.expert_lora import ExpertParameter
from pylora.model.linear import DropKey, Grads, LinearCache, LoRALinear, Own, is_packed
from pylora.model.weights import Weights
from pylora.ops.llama import EXPERT
from pylora.ops.llama import Experts as Mix
from pylora.ops.mixture import Choice, choose_backward
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm, Projection, ProjectionGrad, brief


@dataclass(eq=False)
class ExpertsCache:
    __repr__ = brief

    x: Array | None  # [m, hidden], put there where the router is trained
    rstd: Array | None
    choice: Choice
    inner: list[tuple[Array, Array, Array, list[LinearCache]] | None]  # gate, up, out of each


class Experts:
    """The experts of one layer and their router; it has the methods of MLP."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        weights: Weights,
        *,
        ops: Backend,
        precision: str = "fp32",
    ) -> None:
        self.ops, self.activation = ops, config.activation
        self.dtype: Any = ops.activation_dtype(precision)
        self.hidden = config.hidden_size
        names, at = config.names, f"{config.names.layer}.{layer}"
        router = weights(f"{at}.{names.router}.weight")
        router = router if is_packed(router) else ops.pack(router)  # never rounded: it chooses
        self.mix = Mix(router, config.experts, config.experts_per_token, config.norm_expert_weights)
        self.own: Own | None = None  # of the router, where it is trained
        self.experts: list[tuple[LoRALinear, ...]] = []
        for e in range(config.experts):
            made = []
            for role in EXPERT:
                path = f"{at}.{names.experts}.{e}.{getattr(names, f'expert_{role}')}"
                W = weights(f"{path}.weight")
                made.append(LoRALinear(path, W, ops=ops, precision=precision))
            self.experts.append(tuple(made))
        held = f"{at}.{names.parameters}"
        self.parameters = (
            ExpertParameter(f"{held}.gate_up_proj", [e[:2] for e in self.experts], ops=ops),
            ExpertParameter(f"{held}.down_proj", [e[2:] for e in self.experts], ops=ops),
        )

    @property
    def linears(self) -> tuple[ExpertParameter, ...]:
        """What an adapter may sit on."""
        return self.parameters

    @property
    def numbered(self) -> tuple[LoRALinear, ...]:
        """All modules in the order of `LayerWeights.W`."""
        return tuple(p for expert in self.experts for p in expert)

    @property
    def input_lora(self) -> bool:
        """Whether backward needs x: for the router. Each expert keeps the rows it was given."""
        return self.own is not None

    @property
    def trainable(self) -> bool:
        return self.own is not None or any(p.lora is not None for p in self.parameters)

    def forward(
        self,
        x: Array,
        *,
        norm: Norm | None = None,
        residual: Array | None = None,
        drop: DropKey | None = None,
    ) -> tuple[Array, ExpertsCache]:
        """x [m, hidden] -> residual + the experts' sum [m, hidden], and the cache for backward."""
        ops, rstd = self.ops, None
        if norm is not None:
            x, rstd = ops.norm_forward(x, norm, self.dtype)
        [(logits, _)] = ops.linear_forward(x, [Projection(self.mix.router)])
        mix = self.mix
        choice = ops.choose(logits, mix.top_k, mix.normalize)
        y = ops.zeros((x.shape[0], self.hidden), logits.dtype)
        inner: list[Any] = []
        for expert, rows, places in zip(self.experts, choice.rows, choice.places):
            if rows.size == 0:
                inner.append(None)
                continue
            rows, places = ops.xp.asarray(rows), ops.xp.asarray(places)
            some = x[rows]
            (gate, a), (up, b) = (p.forward(some, drop=drop, dtype=self.dtype) for p in expert[:2])
            product = ops.activation_forward(gate, up, self.activation, self.dtype)
            out, c = expert[2].forward(product, drop=drop)
            y[rows] += out * choice.weights[rows, places][:, None]
            inner.append((gate, up, out, [a, b, c]))
        if residual is not None:
            y = residual + y
        return y, ExpertsCache(None, rstd, choice, inner)

    def backward(
        self, dy: Array, cache: ExpertsCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        ops, choice, mix = self.ops, cache.choice, self.mix
        if not need_dx and not self.trainable:
            return None
        m = dy.shape[0]
        dx = ops.zeros((m, self.hidden), dy.dtype)
        dw = ops.zeros((m, mix.top_k), dy.dtype)
        for expert, rows, places, kept in zip(
            self.experts, choice.rows, choice.places, cache.inner
        ):
            if kept is None:
                continue
            gate, up, out, (a, b, c) = kept
            rows, places = ops.xp.asarray(rows), ops.xp.asarray(places)
            some = dy[rows]
            dw[rows, places] = (some * out).sum(axis=1)
            dout = some * choice.weights[rows, places][:, None]
            dz = expert[2].backward(dout, c, grads, dtype=self.dtype)
            dgate, dup = ops.activation_backward(dz, gate, up, self.activation, self.dtype)
            back = expert[0].backward(dgate, a, grads, need_dx=need_dx)
            back = expert[1].backward(dup, b, grads, add=back, need_dx=need_dx)
            if need_dx:
                dx[rows] += back
        for parameter in self.parameters:
            parameter.gather(grads)
        if not need_dx and self.own is None:
            return None
        dlogits = choose_backward(dw, choice, mix.normalize, ops.xp)
        if self.own is not None:
            assert cache.x is not None
            self.own.add(ops, grads, dlogits, cache.x)
        if not need_dx:
            return None
        grad = ProjectionGrad(ops.xp.ascontiguousarray(dlogits), mix.router)
        return ops.linear_backward(None, [grad], add=dx)[0]
