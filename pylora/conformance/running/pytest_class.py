"""The kit as a pytest class: one test for each law.

class TestMine(LoRAConformance):
    implementation = Mine
"""

from __future__ import annotations

from typing import Any

from pylora.conformance.laws.registry import LAWS
from pylora.conformance.protocol import instantiate, problems_of
from pylora.conformance.running.report import details
from pylora.conformance.running.runner import BROKEN, FAILED, NOT_TESTED, PROFILES, run_law
from pylora.extras import need


class LoRAConformance:
    """Set `implementation`; `examples`, `seed` and `laws` (ids, all if empty) may be set too.

    What an implementation lacks is skipped, with the reason, never passed.
    """

    implementation: Any = None
    examples: int = PROFILES["quick"]
    seed: int = 0
    laws: tuple[str, ...] = ()

    def test_what_it_says_of_itself(self) -> None:
        assert problems_of(instantiate(type(self).implementation)) == []

    def test_law(self, law_id: str) -> None:
        """One law; pytest calls it with each id (see pytest_generate_tests)."""
        made = instantiate(type(self).implementation)
        outcome = run_law(made, LAWS[law_id], examples=self.examples, seed=self.seed)
        if outcome.status == NOT_TESTED:
            need("pytest").skip(f"{law_id} not tested: {outcome.reason}")
        if outcome.status in (FAILED, BROKEN):
            need("pytest").fail(details(outcome), pytrace=False)

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        if "law_id" in metafunc.fixturenames:
            metafunc.parametrize("law_id", cls.laws or tuple(LAWS))
