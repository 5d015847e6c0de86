"""Hugging Face PEFT under the kit: its Linear layer, its files and its choice of modules.

PYTHONPATH=examples/conformance pylora conformance peft_adapter:Peft
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

try:
    import peft
    import torch
    from peft.tuners.lora.layer import Embedding, Linear
    from torch_plain import array, seeded, tensor
except ImportError as error:
    raise SystemExit(f"this example needs PyTorch and PEFT: {error}") from None

logging.getLogger("peft").setLevel(logging.ERROR)


MANY = 64  # adapters: PEFT goes through all that it has for each that is added


def few_enough(adapters: int) -> None:
    """What would take minutes is said not to be there, and is then not tested."""
    if adapters > MANY:
        raise NotImplementedError(f"PEFT takes minutes to add {adapters} adapters")


def base_layer(W: Any, bias: Any = None) -> Any:
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    layer.weight = torch.nn.Parameter(tensor(W), requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(tensor(bias), requires_grad=False)
    return layer


class Peft:
    """One PEFT layer for each call, its arrays put in."""

    name = f"PEFT {peft.__version__}"
    dtypes = ("float32", "float64", "bfloat16")
    file_format = "peft"
    # Those of PEFT's that change the base are carried out, on a base that the kit does not look at.
    init_methods = ("kaiming", "gaussian", "pissa", "olora", "corda", "loftq", "lora_ga")

    def _layer(self, W: Any, adapters: Any, bias: Any = None, p: float = 0.0) -> Any:
        """A layer with the adapters "0", "1", ..., all active."""
        few_enough(len(adapters))
        layer = None
        for i, (A, _, scale) in enumerate(adapters):
            r = A.shape[0]
            config = peft.LoraConfig(r=r, lora_alpha=scale * r, lora_dropout=p)
            if layer is None:
                layer = Linear(base_layer(W, bias), str(i), config, r=r, lora_alpha=scale * r)
            else:
                layer.update_layer(str(i), r, lora_alpha=scale * r, config=config)
        for i, (A, B, _) in enumerate(adapters):
            layer.lora_A[str(i)].weight = torch.nn.Parameter(tensor(A))
            layer.lora_B[str(i)].weight = torch.nn.Parameter(tensor(B))
        layer.set_adapter([str(i) for i in range(len(adapters))])
        return layer

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        return array(self._layer(W, [(A, B, scale)], bias)(tensor(x)))

    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        return array(base_layer(W, bias)(tensor(x)))

    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        return self.dropout_backward(dy, x, W, A, B, scale, 0.0, 0)

    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        layer = self._layer(W, [(A, B, scale)], p=p).train()
        seeded(seed)
        return array(layer(tensor(x)))

    def dropout_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        layer, x = self._layer(W, [(A, B, scale)], p=p).train(), tensor(x).requires_grad_()
        seeded(seed)
        layer(x).backward(tensor(dy))
        grads = x.grad, layer.lora_A["0"].weight.grad, layer.lora_B["0"].weight.grad
        dW = layer.base_layer.weight.grad
        return *map(array, grads), None if dW is None else array(dW)

    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora)
        layer = Linear(torch.nn.Linear(1, 1), "0", config, r=r, lora_alpha=alpha)
        return float(layer.scaling["0"])

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> Any:
        how: Any = "gaussian" if method == "gaussian" else True
        config = peft.LoraConfig(r=r, init_lora_weights=how)
        base = torch.nn.Linear(k, d)
        seeded(seed)
        layer = Linear(base, "0", config, r=r, lora_alpha=1)
        return array(layer.lora_A["0"].weight), array(layer.lora_B["0"].weight)

    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._layer(W, [(A, B, scale)])
        layer.merge()
        return array(layer.base_layer.weight)

    def unmerge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._layer(W, [(A, B, scale)])
        layer.merged_adapters = ["0"]
        layer.unmerge()
        return array(layer.base_layer.weight)

    def forward_stacked(self, x: Any, W: Any, adapters: Any, bias: Any = None) -> Any:
        if not adapters:
            return self.base(x, W, bias)
        return array(self._layer(W, adapters, bias)(tensor(x)))

    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        if not adapters:
            if (rows >= 0).any():
                raise IndexError("there is no adapter")
            return self.base(x, W, bias)
        names = ["__base__" if row < 0 else str(row) for row in rows]
        used = {0, *(int(row) for row in rows if 0 <= row < len(adapters))}
        few_enough(len(used))
        model: Any = OneLinear(base_layer(W, bias))
        for i in sorted(used):
            A, B, scale = adapters[i]
            r = A.shape[0]
            config = peft.LoraConfig(r=r, lora_alpha=scale * r, target_modules=["linear"])
            if i == 0:
                model = peft.get_peft_model(model, config, adapter_name="0")
            else:
                model.add_adapter(str(i), config)
            layer = model.base_model.model.linear
            layer.lora_A[str(i)].weight = torch.nn.Parameter(tensor(A))
            layer.lora_B[str(i)].weight = torch.nn.Parameter(tensor(B))
        return array(model.eval()(x=tensor(x), adapter_names=names))

    # ---- biases of B (lora_bias) and embeddings -------------------------------------------------

    def _biased(self, W: Any, A: Any, B: Any, more: Any, scale: float, bias: Any) -> Any:
        r = A.shape[0]
        config = peft.LoraConfig(r=r, lora_alpha=scale * r, lora_bias=True)
        layer = Linear(base_layer(W, bias), "0", config, r=r, lora_alpha=scale * r)
        layer.lora_A["0"].weight = torch.nn.Parameter(tensor(A))
        layer.lora_B["0"].weight = torch.nn.Parameter(tensor(B))
        layer.lora_B["0"].bias = torch.nn.Parameter(tensor(more))
        return layer

    def bias_forward(
        self, x: Any, W: Any, A: Any, B: Any, bias_B: Any, scale: float, bias: Any = None
    ) -> Any:
        return array(self._biased(W, A, B, bias_B, scale, bias)(tensor(x)))

    def bias_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, bias_B: Any, scale: float
    ) -> Any:
        layer, x = self._biased(W, A, B, bias_B, scale, None), tensor(x).requires_grad_()
        layer(x).backward(tensor(dy))
        low, up = layer.lora_A["0"], layer.lora_B["0"]
        return tuple(array(t) for t in (x.grad, low.weight.grad, up.weight.grad, up.bias.grad))

    def bias_merge(self, W: Any, bias: Any, A: Any, B: Any, bias_B: Any, scale: float) -> Any:
        if bias is None:
            raise NotImplementedError("PEFT refuses to merge lora_bias into a layer without bias")
        layer = self._biased(W, A, B, bias_B, scale, bias)
        layer.merge()
        return array(layer.base_layer.weight), array(layer.base_layer.bias)

    def _embedding(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        base, r = torch.nn.Embedding(*W.shape), A.shape[0]
        base.weight = torch.nn.Parameter(tensor(W), requires_grad=False)
        config = peft.LoraConfig(r=r, lora_alpha=scale * r)
        layer = Embedding(base, "0", config, r=r, lora_alpha=scale * r)
        layer.lora_embedding_A["0"] = torch.nn.Parameter(tensor(A))
        layer.lora_embedding_B["0"] = torch.nn.Parameter(tensor(B))
        return layer

    def embedding_forward(self, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        ids = torch.from_numpy(np.asarray(ids).astype(np.int64))
        return array(self._embedding(W, A, B, scale)(ids))

    def embedding_backward(self, dy: Any, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._embedding(W, A, B, scale)
        ids = torch.from_numpy(np.asarray(ids).astype(np.int64))
        layer(ids).backward(tensor(dy))
        return array(layer.lora_embedding_A["0"].grad), array(layer.lora_embedding_B["0"].grad)

    def embedding_merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer = self._embedding(W, A, B, scale)
        layer.merge()
        return array(layer.base_layer.weight)

    def embedding_init(self, vocab: int, hidden: int, r: int, seed: int, random: bool) -> Any:
        base = torch.nn.Embedding(vocab, hidden)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=r, init_lora_weights=not random)
        layer = Embedding(base, "0", config, r=r, lora_alpha=1)
        return array(layer.lora_embedding_A["0"]), array(layer.lora_embedding_B["0"])

    def module(self, W: Any, bias: Any = None) -> Any:
        return PeftModule(self, W, bias)

    def save(self, directory: str, adapters: Any, config: Any) -> None:
        modules = {path: (B.shape[0], A.shape[1]) for path, (A, B) in adapters.items()}
        model = peft.get_peft_model(tree(modules), peft.LoraConfig(**config))
        for path, layer in lora_layers(model):
            A, B = adapters[path]
            layer.lora_A["default"].weight.data = tensor(A)
            layer.lora_B["default"].weight.data = tensor(B)
        model.save_pretrained(directory)

    def load(self, directory: str, modules: Any) -> Any:
        model = peft.PeftModel.from_pretrained(tree(modules), directory)
        return {
            path: (
                array(layer.lora_A["default"].weight),
                array(layer.lora_B["default"].weight),
                layer.scaling["default"],
            )
            for path, layer in lora_layers(model)
        }

    def plan(self, config: Any, modules: Any) -> Any:
        if config.get("use_dora") or config.get("use_qalora"):
            raise ValueError("PEFT has these, but a plan of r, alpha and scale cannot say them")
        model = peft.get_peft_model(tree(modules), peft.LoraConfig(**config))
        return {
            path: (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"])
            for path, layer in lora_layers(model)
        }


class PeftModule:
    """A model of one module, as PEFT's users see it."""

    def __init__(self, maker: Peft, W: Any, bias: Any) -> None:
        self.maker, self.layer = maker, base_layer(W, bias)

    def forward(self, x: Any) -> Any:
        return array(self.layer(tensor(x)))

    def attach(self, A: Any, B: Any, scale: float) -> None:
        r = A.shape[0]
        config = peft.LoraConfig(r=r, lora_alpha=scale * r)
        if isinstance(self.layer, Linear):  # another adapter beside the first, and this one active
            if self.layer.merged:  # as PeftModel.set_adapter does, with a warning
                self.layer.unmerge()
            name = str(len(self.layer.lora_A))
            self.layer.update_layer(name, r, lora_alpha=scale * r, config=config)
        else:
            name = "0"
            self.layer = Linear(self.layer, name, config, r=r, lora_alpha=scale * r)
        self.layer.lora_A[name].weight = torch.nn.Parameter(tensor(A))
        self.layer.lora_B[name].weight = torch.nn.Parameter(tensor(B))
        self.layer.set_adapter(name)

    def detach(self) -> None:
        if isinstance(self.layer, Linear):
            self.layer.unmerge()
            self.layer = self.layer.base_layer

    def merge(self) -> None:
        self.layer.merge()

    def unmerge(self) -> None:
        self.layer.unmerge()

    def weight(self) -> Any:
        return array(getattr(self.layer, "base_layer", self.layer).weight)


class OneLinear(torch.nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Any) -> Any:
        return self.linear(x)


def tree(modules: Any) -> Any:
    """A model of nested modules with a Linear [d,k] at each path."""
    root = torch.nn.Module()
    for path, size in modules.items():
        *parents, name = path.split(".")
        node = root
        for part in parents:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        other = torch.nn.LayerNorm(2)  # a module that cannot take LoRA
        node.add_module(name, torch.nn.Linear(*size[::-1], bias=False) if size else other)
    return root


def lora_layers(model: Any) -> Any:
    prefix = "base_model.model."
    return [(n[len(prefix) :], m) for n, m in model.named_modules() if isinstance(m, Linear)]


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    print(text(run(Peft)))
