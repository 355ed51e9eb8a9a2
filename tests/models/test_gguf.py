"""GGUF conversion: every weight and token arrives, once, and nothing half-made is ever trusted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cadenza.models import LoadConfig, LoadedModel, ModelError, load_model, resolve
from cadenza.models.fetch import ALIASES, fetch
from cadenza.models.gguf import announce
from cadenza.models.gguf_header import read_header

CPU = LoadConfig(device="cpu")
RESOLVE = "import sys; from cadenza.models import resolve; print(resolve(sys.argv[1]))"


def test_converted_weights_equal_the_ones_written(
    cache: Path, write_gguf: Callable[..., Path], tiny_model: LlamaForCausalLM
) -> None:
    loaded = load_model(str(write_gguf()), CPU)
    expected = tiny_model.state_dict()
    found = loaded.module.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    ids = torch.tensor([[5, 90, 17, 200]])
    torch.testing.assert_close(loaded.module(ids).logits, tiny_model(ids).logits)
    assert loaded.name == "tiny"
    assert loaded.eos_token_ids == (2, 0)
    assert loaded.max_model_len == 128


def test_quantized_tensors_equal_the_gguf_packages_dequantization(smollm2_path: Path) -> None:
    reader = GGUFReader(fetch(ALIASES["smollm2"]))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "blk.7.attn_norm.weight": "model.layers.7.input_layernorm.weight",
    }
    with safe_open(smollm2_path / "model.safetensors", framework="pt") as converted:
        assert "lm_head.weight" not in converted.keys()  # noqa: SIM118 (not a dict); tied, stored once
        for theirs, ours in pairs.items():
            tensor = tensors[theirs]
            expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(converted.get_tensor(ours), expected), ours


def test_the_real_models_tokens(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, *tokenizer.encode("user"), 2]
    assert {0, 1, 2} <= tokenizer.special_ids
    assert tokenizer.eos_token_id == 2
    assert smollm2.eos_token_ids == (2,)
    digits = tokenizer.encode("20417")
    assert [tokenizer.token_string(token_id) for token_id in digits] == ["2", "0", "4", "1", "7"]
    for text in ("naïve café", "漢字かな 한국어", "👩‍🚀🏽 and 🦜", "tabs\tand\n\nlines  ", "𝔘𝔫𝔦"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "numbers"),
    [
        ("gpt-2", ["12", "3"]),
        ("smollm", ["1", "2", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("llama-bpe", ["12", "3"]),
    ],
)
def test_text_is_cut_as_the_file_says(
    cache: Path, write_gguf: Callable[..., Path], pre: str, numbers: list[str]
) -> None:
    tokenizer = load_model(str(write_gguf(pre=pre)), CPU).tokenizer
    assert [tokenizer.token_string(token_id) for token_id in tokenizer.encode("123")] == numbers


def test_a_sentencepiece_vocabulary(cache: Path, write_gguf: Callable[..., Path]) -> None:
    tokenizer = load_model(str(write_gguf(sentencepiece=True)), CPU).tokenizer
    ids = tokenizer.encode("he 漢</s>hel")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert ids[:2] == [1, 263]
    assert 2 in ids[2:]
    plain = tokenizer.encode("he 漢 hel", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, plain)) == " he 漢 hel".encode()
    assert tokenizer.decode(plain) == "he 漢 hel"


def test_the_second_start_uses_the_conversion(cache: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    folder = resolve(str(path))
    before = (folder / "model.safetensors").stat()
    assert resolve(str(path)) == folder
    after = (folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_conversion_is_made_again(
    cache: Path, write_gguf: Callable[..., Path], tiny_model: LlamaForCausalLM
) -> None:
    path = write_gguf()
    weights = resolve(str(path)) / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert resolve(str(path)) == weights.parent
    assert torch.equal(load_file(weights)["model.norm.weight"], tiny_model.model.norm.weight)


def test_a_changed_file_is_another_model(cache: Path, write_gguf: Callable[..., Path]) -> None:
    first = resolve(str(write_gguf(pre="gpt-2")))
    second = resolve(str(write_gguf(pre="smollm")))
    assert first != second


@pytest.mark.parametrize("kept", [0, 3, 40, 3000, -1])
def test_a_truncated_file_is_refused_in_one_line(
    cache: Path, write_gguf: Callable[..., Path], kept: int
) -> None:
    path = write_gguf()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"tiny\.gguf") as refusal:
        resolve(str(path))
    assert "\n" not in str(refusal.value)
    assert not list((cache / "converted").glob("*"))


def test_a_missing_tensor_is_named(cache: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(without="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(path))
    assert not list((cache / "converted").glob("*"))
    assert not list((cache / "converted").glob(".*"))


def test_the_header_reader_agrees_with_the_gguf_package(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    header, reader = read_header(path), GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents(), key
    assert header.num_elements == sum(int(tensor.n_elements) for tensor in reader.tensors)


@pytest.mark.parametrize(
    ("kind", "quantization", "line"),
    [
        (
            "Q4_1",
            "none",
            "GGUF Q4_1 weights are dequantized to float32; --quantization int4 keeps them in 4 bits",
        ),
        (
            "Q8_0",
            "none",
            "GGUF Q8_0 weights are dequantized to float32; --quantization int8 keeps them in 8 bits",
        ),
        ("Q4_1", "int8", "GGUF Q4_1 weights are dequantized to float32, then stored as int8"),
        ("F16", "none", None),
        (None, "none", None),
    ],
)
def test_what_became_of_quantized_weights_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str | None, quantization: str, line: str | None
) -> None:
    facts = {"files": {}} | ({} if kind is None else {"gguf_type": kind})
    (tmp_path / "cadenza.json").write_text(json.dumps(facts))
    with caplog.at_level("INFO"):
        announce(tmp_path, quantization)
    assert [record.getMessage() for record in caplog.records] == ([] if line is None else [line])


def test_the_real_files_main_type() -> None:
    assert read_header(fetch(ALIASES["smollm2"])).main_type == "Q4_1"


def test_a_killed_conversion_leaves_nothing_that_is_trusted(
    cache: Path, write_gguf: Callable[..., Path], tiny_model: LlamaForCausalLM
) -> None:
    path = write_gguf()
    die_after_writing = (
        "import os, signal, safetensors.torch as st\n"
        "write = st.save_file\n"
        "st.save_file = lambda *a, **k: (write(*a, **k), os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    killed = subprocess.run([sys.executable, "-c", die_after_writing + RESOLVE, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = list((cache / "converted").iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".")

    folder = resolve(str(path))
    assert list((cache / "converted").iterdir()) == [folder]
    assert torch.equal(
        load_file(folder / "model.safetensors")["model.norm.weight"], tiny_model.model.norm.weight
    )


def test_two_processes_at_once_share_one_conversion(cache: Path, write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    starts = [
        subprocess.Popen([sys.executable, "-c", RESOLVE, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [start.communicate(timeout=120)[0].strip() for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert answers[0] == answers[1]
    assert list((cache / "converted").iterdir()) == [Path(answers[0])]
