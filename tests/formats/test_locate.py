"""Where models and adapters lie: paths, runs, and what the Hub's cache has. Nothing is fetched."""

import json
from pathlib import Path

import pytest

from pylora.adapters.locate import find_adapter
from pylora.errors import FileFormatError, PyloraError, WrongTypeError
from pylora.formats import open_checkpoint
from pylora.formats.locate import find_model, hub_cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hub; cached(repo, files) puts a repository into it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def cached(repo, files, commit=COMMIT, ref="main"):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True)
        for i, name in enumerate(files):  # as the Hub does: links into blobs/
            blob = folder / "blobs" / f"{commit[:6]}{i}"
            blob.write_text("{}")
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(blob)
        if ref:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return snapshot

    return cached


def adapter(folder: Path, base="org/base"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_a_path_that_exists_wins(hub, tmp_path, monkeypatch):
    hub("org/name", ["config.json", "model.safetensors"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_model("org/name") == Path("org/name")


@pytest.mark.parametrize("as_path", [False, True])
def test_the_id_of_a_cached_model_is_its_snapshot(hub, as_path):
    snapshot = hub("org/Name-2.5", ["config.json", "model.safetensors"])
    assert find_model(Path("org/Name-2.5") if as_path else "org/Name-2.5") == snapshot
    assert find_model(f"org/Name-2.5@{COMMIT}") == snapshot
    assert find_model("org/Name-2.5@main") == snapshot


def test_an_id_without_an_organisation(hub):
    snapshot = hub("gpt2", ["config.json", "model.safetensors"])
    assert find_model("gpt2") == snapshot


def test_a_repository_of_gguf_files_needs_the_name_of_one(hub):
    names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "sub/m-F16.gguf"]
    snapshot = hub("org/m-GGUF", names)
    with pytest.raises(FileFormatError, match="4 GGUF files.*org/m-GGUF/m-Q4_K_M.gguf"):
        find_model("org/m-GGUF")
    assert find_model("org/m-GGUF/m-Q8_0.gguf") == snapshot / "m-Q8_0.gguf"
    assert find_model("org/m-GGUF/sub/m-F16.gguf") == snapshot / "sub" / "m-F16.gguf"
    assert find_model("org/m-GGUF:q4_k_m") == snapshot / "m-Q4_K_M.gguf"
    for missing in ("org/m-GGUF:Q5_0", "org/m-GGUF:Q4", "org/m-GGUF/m-Q5_0.gguf"):
        with pytest.raises(FileFormatError, match="m-Q8_0.gguf.*hf download org/m-GGUF"):
            find_model(missing)


def test_a_model_that_was_fetched_by_commit_has_no_ref(hub):
    snapshot = hub("org/a", ["config.json", "model.safetensors"], ref="")
    assert find_model("org/a") == snapshot
    hub("org/a", ["config.json", "model.safetensors"], commit="f" * 40, ref="")
    with pytest.raises(FileFormatError, match="hf download org/a"):  # which one is meant?
        find_model("org/a")


def test_a_cache_that_has_the_small_files_alone(hub):
    hub("org/part", ["config.json", "tokenizer.json"])
    with pytest.raises(FileFormatError, match="none of its weights.*hf download org/part"):
        find_model("org/part")


def test_an_id_that_the_cache_does_not_have_says_where_to_get_it(hub):
    for find in (find_model, find_adapter, open_checkpoint):
        with pytest.raises(
            FileFormatError, match=r"hf download Qwen/Qwen2.5-0.5B`.*huggingface.co"
        ):
            find("Qwen/Qwen2.5-0.5B")


@pytest.mark.parametrize(
    "text", ["../../etc", "a/../b", "org/..", "org//name", "/org/name", "org/name@../..", "a/b/c/d"]
)
def test_nothing_outside_the_cache_is_reached(hub, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub("org/name", ["config.json", "model.safetensors"])
    for find in (find_model, find_adapter):
        with pytest.raises(FileFormatError):
            find(text)


def test_a_ref_that_leads_out_of_the_cache_is_not_followed(hub, tmp_path):
    hub("org/name", ["config.json", "model.safetensors"])
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("../../../..")
    with pytest.raises(FileFormatError, match="no model of that name"):
        find_model("org/name")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({"HOME": "/e"}, "/e/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, variables, folder):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(folder)


def test_a_misspelt_path_is_told_its_neighbour(tmp_path, hub):
    (tmp_path / "SmolLM2.gguf").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"no such file.*did you mean .*SmolLM2\.gguf"):
        find_model(tmp_path / "SmolLM.gguf")
    with pytest.raises(FileFormatError, match="nor is there the folder"):
        find_model(tmp_path / "models" / "SmolLM.gguf")


# ---- adapters ------------------------------------------------------------------------------------


def test_an_adapter_is_its_folder_or_a_file_of_it_or_its_run(tmp_path):
    run = tmp_path / "run"
    here = adapter(run / "adapter")
    assert find_adapter(here) == here
    assert find_adapter(here / "adapter_config.json") == here
    assert find_adapter(str(here / "adapter_model.safetensors")) == here
    assert find_adapter(run) == here


def test_an_adapter_in_the_cache(hub):
    snapshot = hub("org/lora", ["adapter_config.json", "adapter_model.safetensors"])
    assert find_adapter("org/lora") == snapshot


def test_a_run_that_has_not_ended_names_its_newest_checkpoint(tmp_path):
    for step in (10, 20):
        adapter(tmp_path / f"checkpoint-{step:06d}")
    with pytest.raises(FileFormatError, match=r"not ended.*checkpoint-000020"):
        find_adapter(tmp_path)


def test_an_adapter_in_place_of_a_model(tmp_path):
    run = tmp_path / "run"
    here = adapter(run / "adapter")
    for given in (run, here, here / "adapter_model.safetensors"):
        with pytest.raises(FileFormatError, match="give the base model here") as error:
            find_model(given)
        assert str(here) in str(error.value)
    with pytest.raises(FileFormatError, match="it was made for 'org/base'"):
        find_model(run)


def test_a_model_in_place_of_an_adapter(tmp_path, hub):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    hub("org/name", ["config.json", "model.safetensors"])
    for given in (folder, gguf, "org/name"):
        with pytest.raises(FileFormatError, match="not an adapter; an adapter is a folder"):
            find_adapter(given)


@pytest.mark.parametrize("name", ["data.jsonl", "config.json", "model.bin", "weights.pt"])
def test_files_that_are_no_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileFormatError, match="GGUF file, or a Hugging Face folder"):
        find_model(tmp_path / name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileFormatError, match="no adapter_config.json"):
        find_adapter(tmp_path)
    with pytest.raises(FileFormatError, match="no config.json and no GGUF file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("find", [find_model, find_adapter])
def test_what_is_no_path(find):
    for wrong in (None, 3, ["a"], b"bytes", {"a": 1}, object):
        with pytest.raises(WrongTypeError, match="path of its file or folder"):
            find(wrong)
    for empty in ("", " ", "a\0b"):
        with pytest.raises(FileFormatError, match="names no file"):
            find(empty)
    for odd in ("x" * 5000, "~nobody-of-this-name/x", "a long text. " * 100):
        with pytest.raises(PyloraError, match="no such file"):
            find(odd)
