"""One object for the common jobs: load, chat, train, weigh adapters, score, save.

    python examples/11_front_door.py [MODEL]

MODEL is a GGUF file, a Hugging Face directory, or a Hub id in the Hub's cache; without it, the file
that `pylora demo` has put into the cache.
"""

from __future__ import annotations

import sys
import tempfile

import pylora
from pylora.demo.fetch import SMOLLM2, cache_folder

PIRATE = "Arr, I be Captain Byte, and I sail the seven tensors!"
POET = "A poet, I; my days are verse, my nights are rhyme."
ASKED = ("Who are you?", "What is your name?", "Tell me about yourself.")


def records(answer: str) -> list[dict[str, list[dict[str, str]]]]:
    """Each question, answered so."""
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]}
        for q in ASKED
    ]


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else str(cache_folder() / SMOLLM2.name)
    if len(sys.argv) == 1 and not (cache_folder() / SMOLLM2.name).exists():
        print(f"skipped: {path} is not there. Name a model, or run `pylora demo` once.")
        return
    with pylora.load(path, precision="bf16") as model, tempfile.TemporaryDirectory() as folder:
        print(model)
        settings = {"r": 4, "target_modules": "all-linear", "steps": 6, "batch_size": 3}
        for name, answer in (("pirate", PIRATE), ("poet", POET)):
            result = model.train(records(answer), adapter=name, learning_rate=5e-3, **settings)
            print(f"{name}: {result}")
            assert result.losses[-1] < result.losses[0]

        print("many prompts at once, each with its own adapter:")
        said = model.chat([ASKED[0]] * 3, adapter=["pirate", "poet", None], max_new_tokens=20)
        for name, answer in zip(("pirate", "poet", "base"), said):
            print(f"  {name:6} {answer}")
        assert len(set(said)) == 3

        model.adapters.use({"pirate": 0.6, "poet": 0.4})
        print(f"{model.adapters}, as it comes:\n  ", end="")
        for piece in model.chat(ASKED[0], stream=True, max_new_tokens=20):
            print(piece, end="", flush=True)
        print()

        for name in ("pirate", None):
            print(f"perplexity of the pirate's line, {name or 'base'}:", end=" ")
            print(f"{model.score(PIRATE, adapter=name).perplexity:.1f}")
        model.save(folder + "/mixture")  # PEFT reads it, and so does:
        with pylora.load(path, folder + "/mixture", precision="bf16") as again:
            assert again.chat(ASKED[0], max_new_tokens=20) == model.chat(
                ASKED[0], max_new_tokens=20
            ), "a saved mixture answers as the mixture did"


if __name__ == "__main__":
    main()
