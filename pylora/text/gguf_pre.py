"""Pre-tokenizers of byte-level BPE by the names that GGUF files give them (tokenizer.ggml.pre).

A name stands for the expressions that cut a text before anything is merged, each cutting the pieces
of the one before. What a name means is llama.cpp's definition (src/llama-vocab.cpp, unicode.cpp),
which the tests compare with name by name. Names whose cutting is no matter of expressions there, or
whose vocabulary is not byte-level, are refused: a wrong pre-tokenizer gives wrong ids without any
error.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pre:
    """splits: the expressions. whole: a piece that is a token is not merged from its parts.
    adds_bos: the start token is added unless the file says otherwise. known: the name is known."""

    splits: tuple[str, ...]
    whole: bool = False
    adds_bos: bool = False


# English endings with any case; written out, since ignoring case would take in the long s as well.
_ENDINGS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_SPACE = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"


def _modern(digits: str, word: str = _WORD, other: str = rf"{_OTHER}[\r\n]*") -> str:
    """The expression that Llama 3 made common, with its own way of cutting numbers."""
    return rf"(?:{_ENDINGS})|{word}|{digits}|{other}|{_LINES}|{_SPACE}"


def _cased(letters: str, endings: str, digits: str) -> str:
    """Words cut where lower case turns into upper case; letters without case count as both."""
    upper, lower = rf"(?:(?=[{letters}])[^a-z])", rf"(?:(?=[{letters}])[^A-Z])"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{upper}*{lower}+{endings}|{before}{upper}+{lower}*{endings}"
    return rf"{words}|{digits}|{_OTHER}[\r\n/]*|{_LINES}|{_SPACE}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3, _QWEN2 = _modern(r"\p{N}{1,3}"), _modern(r"\p{N}")
_ASCII = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_WORD = rf"{_ASCII}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_THREES = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # numbers in threes, from their end


def _chars(ranges: str) -> str:
    """What stands in [] for code points in hexadecimal, such as "c0-d6 d8"."""
    part = lambda point: rf"\x{{{int(point, 16):X}}}"
    return "".join("-".join(map(part, r.split("-"))) for r in ranges.split())


# Written without the wide spaces in them, which llama.cpp takes for a space there.
_EAST = (
    "["
    + _chars("800-167f 1681-1fff 200b-2027 202a-202e 2030-205e 2060-2fff 3001-9fa5 ac00-d7ff")
    + "]+"
)
_CJK = "[" + _chars("4e00-9fa5 3040-30ff") + "]+"
_LETTERS = "A-Za-z" + _chars(
    """
    b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a
    38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba
    1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d
    1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc
    1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d
    2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b
    2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e
    ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb
    10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
    """
)
_STOPS = r" ?[^(\s|.,!?" + _chars("2026 3002 ff0c 3001 964 6d4 60c") + ")]+"

_YOUTU = (
    "ac00-d7a3 3131-318e",
    "ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f",
    "3105-312f",
)
_SCRIPTS = (
    "4e00-9fff 3400-4dbf 8c48-faff 3040-30ff ff65-ff9f 2f00-2fdf e40-eff 1780-17ff 1000-109f "
    "aa60-aa7f a9e0-a9ff ac00-d7af 1100-11ff"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _CJK,
    rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACE}",
)
_PRES: dict[str, Pre] = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Pre((_GPT2,)),
    "llama-bpe": Pre((_LLAMA3,), whole=True, adds_bos=True),
    "dbrx": Pre((_LLAMA3,)),
    "glm4": Pre((_LLAMA3,), whole=True),
    "qwen2": Pre((_QWEN2,)),
    "smollm": Pre((r"\p{N}", _GPT2)),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Pre(
        (
            "[\r\n]",
            rf"\s?[{_LETTERS}]+",
            r"\s?[!-/:-~" + _chars("ff01-ff0f ff1a-ff5e 2018-201f 3001-3002") + "]+",
            r"\s+\z",
            _EAST,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}")),
    "deepseek-v3": Pre(_DEEPSEEK3),
    "spark2_5": Pre(
        (*_DEEPSEEK3[:2], rf"{_DEEPSEEK_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACE}", r"\p{N}")
    ),
    "youtu": Pre(
        (
            "|".join([*(f"[{_chars(r)}]+" for r in _YOUTU), _CJK]),
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_ENDINGS})?|\p{{N}}|{_OTHER}[\r\n/]*"
            rf"|{_LINES}|{_SPACE}",
        ),
        whole=True,
    ),
    "jais-2": Pre(
        (
            rf"(?:{_ENDINGS})|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}[\r\n]*|{_LINES}|"
            + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8"))
            + r"|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "qwen35": Pre(
        (_modern(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)
    ),
    "bloom": Pre((_STOPS,)),
    "viking": Pre((_STOPS, r"\p{N}")),
    "tekken": Pre((_cased(r"\p{L}", "", r"\p{N}"),), whole=True, adds_bos=True),
    "gpt-4o": Pre((_cased(r"\p{L}", rf"(?:{_ENDINGS})?", r"\p{N}{1,3}"),)),
    "granite-embed-multi-97m": Pre(
        (_cased(r"\p{L}\p{M}", rf"(?:{_ENDINGS})?", r"\p{N}{1,3}"),), whole=True
    ),
    "tiny_aya": Pre(
        (
            _THREES,
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+(?:{_ENDINGS})?|\p{{N}}{{1,3}}"
            rf"|{_OTHER}[\r\n/]*|{_LINES}|{_SPACE}",
        )
    ),
    "bailingmoe": Pre(
        (
            r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
            rf"|{_WORD}|\p{{N}}|{_OTHER}[\r\n]*|\s*[\r\n]|{_SPACE}",
        )
    ),
    "seed-coder": Pre((_modern(r"\p{N}", other=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "ufakzeka": Pre((rf"{_WORD}|\p{{N}}|{_OTHER}[\r\n]*|{_LINES}|{_SPACE}",)),
    "afmoe": Pre(
        (
            _THREES,
            f"[{_chars(_SCRIPTS)}]+",
            _DEEPSEEK3[2],
        )
    ),
    "laguna": Pre((r"[^\n]+|[\n]+", _QWEN2)),
    "exaone-moe": Pre(
        (
            rf"(?:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            rf"|\p{{N}}|{_OTHER}[\r\n/]?|\s*[\r\n]|{_SPACE}",
        )
    ),
    "minicpm5": Pre((r"\p{N}{1,3}", _modern(r"\p{N}+")), whole=True),
    "chameleon": Pre(
        (
            "<sentinel:[0-9]+>",
            "(?:IMGIMG)[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        adds_bos=True,
    ),
}

_ALIASES: dict[str, str] = {
    alias: name
    for name, aliases in {
        "gpt-2": "gpt2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum "
        "modern-bert jina-v1-en jina-v2-code roberta-bpe exaone4 mpt olmo jais trillion "
        "granite-docling",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        "dbrx": "smaug-bpe chatglm-bpe",
        "glm4": "glm5",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "deepseek-v3": "hunyuan-dense hy_v4 joyai-llm",
        "bloom": "poro-chat gpt3-finnish",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "tiny_aya": "cohere2moe",
        "bailingmoe": "bailingmoe2 llada-moe",
    }.items()
    for alias in aliases.split()
}
NAMES = tuple(sorted([*_PRES, *_ALIASES]))
RULES = tuple(_PRES)  # one name for each rule


def find(name: str) -> Pre | None:
    """What `name` stands for, or None. "" is the name of a file that gives none."""
    return _PRES.get(_ALIASES.get(name, name or "default"))
