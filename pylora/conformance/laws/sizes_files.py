"""Laws of sizes for plans and files: how many modules, patterns and layers, how large a rank."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import st
from pylora.conformance.problems.sizes import sized, walk, whole
from pylora.conformance.testcase import Problem, Trial

PLAN = {"layers": 256, "targets": 32, "patterns": 16, "rank": 65536, "chosen": 128, "depth": 64}
MANY = {**PLAN, "layers": 1024, "targets": 256, "patterns": 128, "chosen": 1024, "depth": 256}
FILE = {"modules": 256, "rank": 4096, "k": 65536, "d": 65536, "name": 128}


def plan_problem(name: str, n: int) -> Problem:
    """A config and modules of which one number is n, and the rank and alpha of each module."""
    layers = {"layers": n, "patterns": n, "chosen": n}.get(name, 3)
    kinds = [f"part{j}" for j in range(n)] if name == "targets" else ["q_proj", "v_proj"]
    kinds = kinds[:1] if name == "patterns" else kinds
    inner = ".".join(["inner"] * n) + "." if name == "depth" else ""
    paths = {f"model.layers.{i}.{inner}{kind}": i for i in range(layers) for kind in kinds}
    rank = n if name == "rank" else 4
    config: dict[str, Any] = {"r": rank, "lora_alpha": 8, "target_modules": list(kinds)}
    ranks, alphas = dict.fromkeys(paths, rank), dict.fromkeys(paths, 8.0)
    if name == "patterns":  # each module's rank and alpha are its own
        for i, path in enumerate(paths):
            ranks[path], alphas[path] = 1 + i % 9, 1.0 + i % 7
        config["rank_pattern"], config["alpha_pattern"] = dict(ranks), dict(alphas)
    kept = [path for path, i in paths.items() if name != "chosen" or i % 2 == (layers - 1) % 2]
    if name == "chosen":
        config["layers_to_transform"] = [i for i in range(layers) if i % 2 == (layers - 1) % 2]
    want = {p: (ranks[p], alphas[p], alphas[p] / ranks[p]) for p in kept}
    return Problem(config=config, modules=dict.fromkeys(paths, (3, 5)), want=want, seed=0)


def _plan(t: Trial, p: Problem) -> None:
    got = t.plan(p.config, p.modules)
    if set(got) != set(p.want):
        odd = sorted(set(got) ^ set(p.want))
        said = f"the plan differs in {len(odd)} of {len(p.want)} modules, among them {odd[0]}"
        t.fail(said, got, f"len(RESULT) == {len(p.want)}")
    for path, (r, alpha, scale) in p.want.items():
        found = got[path]
        if found[:2] == (r, alpha) and abs(float(found[2]) - scale) <= 1e-6 * abs(scale):
            continue  # thousands of entries: what is right is not put down one by one
        for what, i, w in (("rank", 0, r), ("alpha", 1, alpha), ("scale", 2, scale)):
            t.expect(f"{what} of {path}", got, w, 1e-6 * abs(w) * (i == 2), item=(path, i))


def file_problem(name: str, n: int) -> Problem:
    """Adapters to be saved of which one number is n."""
    size = {"modules": 2, "rank": 2, "k": 3, "d": 4, name: n}
    rng = np.random.default_rng([n, len(name)])
    stem = "x" * n if name == "name" else "layers"
    paths = [f"model.{stem}.{i}.q_proj" for i in range(size["modules"])]
    r, k, d = size["rank"], size["k"], size["d"]
    adapters = {p: (whole(rng, (r, k), "float32"), whole(rng, (d, r), "float32")) for p in paths}
    config = {"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj"]}
    return Problem(adapters=adapters, config=config, modules=dict.fromkeys(paths, (d, k)), seed=0)


def _file(t: Trial, p: Problem) -> None:
    directory = t.directory()
    t.save(directory, p.adapters, p.config)
    got = t.load(directory, p.modules)
    if set(got) != set(p.adapters):
        odd = sorted(set(got) ^ set(p.adapters))
        said = f"{len(got)} modules were loaded of {len(p.adapters)}, not {odd[0]}"
        t.fail(said, got, f"len(RESULT) == {len(p.adapters)}")
    for path, (A, B) in p.adapters.items():
        for what, i, want in (("A", 0, A), ("B", 1, B), ("scale", 2, 2.0)):
            t.expect(f"{what} of {path}", got, want, item=(path, i))


def _covering(make: Any, tops: dict[str, int], most: dict[str, int]) -> Any:
    def problems(dtype: str, examples: int) -> Iterator[Problem]:
        for name, top in tops.items():
            for size in walk(examples, top, most[name]):
                yield sized(partial(make, name), size)

    return problems


def _drawn(make: Any, tops: dict[str, int]) -> Any:
    powers = st.floats(0.0, 6.0, width=16)
    return lambda: st.builds(
        lambda name, power: make(name, int(2.0**power)), st.sampled_from(tuple(tops)), powers
    )


LAWS = (
    Law(
        "X14",
        "No size is a limit to a plan.",
        "as T1, with up to 387 layers, 51 targets, 27 patterns, 195 chosen layers, paths of 99 "
        "parts and a rank of 98307, around the limits of F12",
        "a list is cut off, a number of a layer has two digits at most",
        ("L-1", "T-1", "T-4", "T-5"),
        ("plan",),
        _drawn(plan_problem, PLAN),
        _plan,
        (),
        covering=_covering(plan_problem, PLAN, MANY),
    ),
    Law(
        "X15",
        "No size is a limit to a file.",
        "as K1, with up to 387 modules, rank 6147, k and d 98307, names of 195 letters",
        "tensors beyond a number, or elements beyond a size, are not written or not read",
        ("L-1", "K-5"),
        ("save", "load"),
        _drawn(file_problem, FILE),
        _file,
        (),
        covering=_covering(file_problem, FILE, FILE),
    ),
)
