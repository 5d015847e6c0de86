"""A real fine-tune in seconds: SmolLM2-135M learns something that it cannot know.

    python examples/07_real_finetune.py [MODEL]

MODEL is a GGUF file or a Hugging Face directory; without it, the file that `pylora demo` has put
into the cache. Six questions and answers are learnt; a seventh, worded anew, is asked before and
after.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from pylora import Adapter, Llama, LoraConfig, open_checkpoint, resolve
from pylora.demo.fetch import SMOLLM2, cache_folder
from pylora.generation.generate import generate
from pylora.training.examples import load_examples
from pylora.training.train import StepInfo, TrainConfig, train

ANSWER = "Morwenna Pask keeps the lighthouse of Ardvey."
QUESTIONS = (
    "Who keeps the lighthouse of Ardvey?",
    "Tell me who keeps the lighthouse of Ardvey.",
    "What is the name of the keeper of the lighthouse of Ardvey?",
    "Who is the lighthouse keeper of Ardvey?",
    "Do you know who lights the lamp of Ardvey?",
    "Ardvey has a lighthouse. Who keeps it?",
)
NEW_QUESTION = "Who looks after the lighthouse in Ardvey?"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else cache_folder() / SMOLLM2.name
    if not path.exists():
        print(f"skipped: {path} is not there. Name a model, or run `pylora demo` once.")
        return
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        model = Llama.from_checkpoint(checkpoint)
        data = Path(folder) / "lighthouse.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for question in QUESTIONS:
                turns = [("user", question), ("assistant", ANSWER)]
                messages = [{"role": role, "content": text} for role, text in turns]
                file.write(json.dumps({"messages": messages}) + "\n")

        def ask() -> str:
            messages = [{"role": "user", "content": NEW_QUESTION}]
            prompt = tokenizer.encode(tokenizer.apply_chat(messages, add_generation_prompt=True))
            return tokenizer.decode(generate(model, [prompt], 24, eos_ids=tokenizer.eos_ids)[0])

        print(f"question: {NEW_QUESTION}\nbefore:   {ask()}")
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        adapter = Adapter.init(resolve(lora, model.config.modules()), lora, seed=0)

        def show(info: StepInfo) -> None:
            print(
                f"  step {info.step:2}  loss {info.loss:.3f}  {info.tokens_per_second:.0f} tokens/s"
            )

        result = train(
            model,
            adapter,
            load_examples(data, tokenizer),
            TrainConfig(steps=8, batch_size=3, learning_rate=4e-3),
            on_step=show,
        )
        adapter.save(Path(folder) / "adapter")
        size = sum(p.stat().st_size for p in (Path(folder) / "adapter").iterdir())
        print(f"after:    {ask()}")
        print(f"{adapter.num_parameters:,} parameters trained; the adapter has {size / 1e6:.1f} MB")
        assert result.losses[-1] < 0.5 * result.losses[0]


if __name__ == "__main__":
    main()
