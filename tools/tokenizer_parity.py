"""Tokenizers against llama.cpp's own, for as many texts as one likes: the nightly's share of them.

    python tools/tokenizer_parity.py --fetch            # the real models, into pylora's cache
    python tools/tokenizer_parity.py --texts 100000     # in all; needs llama-cpp-python

Every pre-tokenizer of byte-level BPE and both kinds of SentencePiece vocabulary, on generated
vocabularies that show each place where a text is cut, and the real models that are in the cache.
Prints a line for each with its texts and differences, and each text that differed; the exit status
is 1 if any did. The texts depend on --seed alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]

from tokenizer_peers import (  # type: ignore[import-not-found]
    MODELS,
    K,
    LlamaCpp,
    texts,
    trained_bpe,
    trained_scores,
    write_vocabulary,
)

from pylora.demo.fetch import GEMMA3, QWEN25, fetch
from pylora.formats.gguf_header import read_header
from pylora.text import gguf_pre
from pylora.text.gguf_vocabulary import tokenizer_from_gguf

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<start_of_turn>",
    "<end_of_turn>", "<h1>", "<repo_name>", "<tool_call>", "<bos>",
)  # fmt: skip


def compare(name: str, path: Path, metadata: dict[str, Any], seed: int, count: int) -> int:
    """Prints a line; returns the number of texts that differ."""
    peer = LlamaCpp(path)
    ours = tokenizer_from_gguf(path, metadata, peer.size)
    wrong = int(set(ours.eos_ids) != peer.ends())
    if wrong:
        print(f"  {name}: ends {sorted(ours.eos_ids)}, llama.cpp {sorted(peer.ends())}")
    tokens = 0
    for text in texts(seed, count, SPECIAL):
        expected = peer.encode(text)
        tokens += len(expected)
        if ours.encode(text) != expected:
            wrong += 1
            print(f"  {name}: {text!r}")
    peer.close()
    print(f"{name}: {count} texts, {tokens} tokens, {wrong} differences", flush=True)
    return wrong


def main() -> int:
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--texts", type=int, default=100_000, help="in all")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--fetch", action="store_true", help="get the real models and end")
    a = parse.parse_args()
    if a.fetch:
        for weights in (GEMMA3, QWEN25):
            fetch(weights, say=print)
        return 0
    names = [name for name in gguf_pre.NAMES if name != "gpt2"]  # llama.cpp knows it no longer
    real = {name: path for name, path in MODELS.items() if path.is_file()}
    # Real models get most: a share for each, and as much as half of one for the generated ones.
    share = a.texts // (len(real) + 1)
    each = -(-(a.texts - share * len(real)) // (len(names) + 5))
    wrong, seen = 0, 0
    for name, path in real.items():
        wrong += compare(name, path, read_header(path).metadata, a.seed, share)
        seen += share
    with tempfile.TemporaryDirectory() as folder:
        file, base = Path(folder) / "v.gguf", trained_bpe(None)
        made = {"no name": base} | {name: base | {K + "pre": name} for name in names}
        for ties in (False, True):
            for prefix in (False, True):
                what = f"SentencePiece, {'equal' if ties else 'distinct'} scores, prefix {prefix}"
                made[what] = trained_scores(ties=ties) | {K + "add_space_prefix": prefix}
        for i, (name, metadata) in enumerate(made.items()):
            write_vocabulary(file, metadata)
            wrong += compare(name, file, metadata, a.seed + i, each)
            seen += each
    print(
        f"{seen} texts on {len(real)} real and {len(made)} generated vocabularies: {wrong} differ"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
