"""Options that people know from other tools and that mean something else here: what to write.

Names that mean the same are aliases of the options themselves. These would change the result if
they were taken as such, or have another form here; a misspelt option is no matter of this file.
"""

from __future__ import annotations

_WHOLE = (
    "elsewhere an update is batch size x accumulation; here --batch-size is the whole update, and "
    "--accumulation the number of parts it is computed in"
)
_MODEL = "the model is the verb's first argument: pylora {verb} MODEL …"
_OUT = "the folder to write is an argument: see pylora {verb} --help"
_NO_SAMPLING = "--temperature T draws tokens; without it the likeliest is taken"
_PRECISION = "write --precision {0} (see pylora {{verb}} --help)"

HINTS: dict[str, str] = {
    "--model": _MODEL,
    "--model-name-or-path": _MODEL,
    "--model-id": _MODEL,
    "--gradient-accumulation-steps": _WHOLE,
    "--grad-accumulation-steps": _WHOLE,
    "--per-device-train-batch-size": _WHOLE,
    "--per-device-eval-batch-size": "--batch-size is that of evaluation, too",
    "--train": "training is the verb: pylora train MODEL DATA OUT",
    "--data": "the data is the second argument: pylora train MODEL DATA OUT",
    "--dataset": "the data is the second argument, a file: pylora train MODEL DATA OUT",
    "--dataset-name": "the data is the second argument, a file: pylora train MODEL DATA OUT",
    "--train-file": "the data is the second argument, a file: pylora train MODEL DATA OUT",
    "--output-dir": _OUT,
    "--output": _OUT,
    "--out": _OUT,
    "--save-path": _OUT,
    "--adapter-file": "give the adapter's folder",
    "--prompt": "the prompt is the second argument: pylora generate MODEL PROMPT",
    "--do-sample": _NO_SAMPLING,
    "--num-beams": "there is no beam search",
    "--bf16": _PRECISION.format("bf16"),
    "--fp16": _PRECISION.format("bf16, or fp16 on cuda"),
    "--load-in-4bit": _PRECISION.format("int4"),
    "--load-in-8bit": _PRECISION.format("int8"),
    "--quantize": _PRECISION.format("int8 or int4"),
    "--dtype": _PRECISION.format("fp32, bf16, int8 or int4"),
    "--device": "what computes is chosen before the verb: pylora --backend cuda {verb} …",
    "--warmup-ratio": "--warmup counts steps",
    "--num-layers": (
        "which modules are adapted is --targets, a regular expression if you like, such as "
        "'.*layers\\.(2[0-9])\\..*'"
    ),
    "--bias": "write it into an adapter_config.json, for --config",
    "--resume-from-checkpoint": "--resume continues the newest checkpoint in OUT",
    "--verbose": "everything is in OUT/log.jsonl",
}
