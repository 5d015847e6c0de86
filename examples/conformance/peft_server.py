"""PEFT behind OpenAI's completions and vLLM's way of loading adapters: the least that a suite asks.

    pylora suite --out suite
    pylora conformance --suite suite --restart \
        'python examples/conformance/peft_server.py {base} {port}'

It is here to test PEFT itself with the suite, not to be used: one request at a time, no sampling.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, port = sys.argv[1], int(sys.argv[2])
dtype = getattr(torch, sys.argv[3] if len(sys.argv) > 3 else "float32")
tokenizer = AutoTokenizer.from_pretrained(base)
load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
plain, adapters = load(), {}
names = [tokenizer.decode([i]) for i in range(len(tokenizer))]


def complete(body):
    model = plain if body.get("model", "base") == "base" else adapters[body["model"]]
    ids = body["prompt"]
    ids = tokenizer(ids)["input_ids"] if isinstance(ids, str) else ids
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    top = torch.topk(logs[-1], body["logprobs"])
    new = int(top.indices[0])
    tokens, values = [names[new]], [float(top.values[0])]
    tops = [{names[i]: float(v) for i, v in zip(top.indices, top.values)}]
    if body.get("echo"):
        tokens = [names[i] for i in ids] + tokens
        values = [None, *(float(logs[i, t]) for i, t in enumerate(ids[1:])), *values]
        tops = [None] * len(ids) + tops
    said = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
    return {"choices": [{"text": names[new], "logprobs": said}]}


class Handler(BaseHTTPRequestHandler):
    def say(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        self.say(200, {"data": [{"id": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            if self.path == "/v1/load_lora_adapter":  # each beside a base of its own
                adapters[body["lora_name"]] = PeftModel.from_pretrained(
                    load(), body["lora_path"], autocast_adapter_dtype=False
                ).to(dtype)
            elif self.path == "/v1/unload_lora_adapter":
                del adapters[body["lora_name"]]
            elif self.path == "/v1/completions":
                return self.say(200, complete(body))
            self.say(200, {})
        except Exception as error:
            self.say(400, {"error": {"message": f"{type(error).__name__}: {error}"}})


HTTPServer(("127.0.0.1", port), Handler).serve_forever()
