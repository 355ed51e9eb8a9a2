"""Tiny models that the loader's tests write to disk: random weights, byte-level tokenizer, real file formats."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("1", "2")]
TOKENS = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache of this test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("CADENZA_CACHE", str(root))
    return root


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_folder(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A local folder as transformers would save it, tokenizer and chat template included."""
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    backend = Tokenizer(BPE({token: place for place, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Q and K: rotary halves interleaved."""
    rows = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write_gguf(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny model as a GGUF file with the gguf package; `without` leaves out one tensor."""
    import gguf

    def write(
        name: str = "tiny.gguf",
        *,
        without: str | None = None,
        pre: str = "gpt-2",
        sentencepiece: bool = False,
    ) -> Path:
        path = tmp_path / name
        config = tiny_model.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(16)
        writer.add_vocab_size(config.vocab_size)
        (add_sentencepiece if sentencepiece else add_byte_level)(writer)
        writer.add_tokenizer_pre(pre)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(0)
        writer.add_chat_template(TEMPLATE)
        for tensor_name, tensor in gguf_tensors(tiny_model).items():
            if tensor_name != without:
                writer.add_tensor(tensor_name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def add_byte_level(writer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])


def add_sentencepiece(writer: Any) -> None:
    """Llama 2's kind of vocabulary: no merges but scores, higher ones merged first."""
    pieces = ["▁", "h", "e", "he", "▁he", "l"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_token_scores([0.0] * 259 + [-4.0, -5.0, -6.0, -1.0, -2.0, -7.0])
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    weights: dict[str, Any] = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours == "attn_q":
                weight = permuted(weight, model.config.num_attention_heads)
            if ours == "attn_k":
                weight = permuted(weight, model.config.num_key_value_heads)
            found[f"blk.{layer}.{ours}.weight"] = weight
    return found


@pytest.fixture
def sharded_folder(tiny_folder: Path, tiny_model: LlamaForCausalLM) -> Path:
    """The tiny folder with its weights in two shards and an index."""
    (tiny_folder / "model.safetensors").unlink()
    weights = {
        name: tensor.clone() for name, tensor in tiny_model.state_dict().items() if name != "lm_head.weight"
    }
    names = sorted(weights)
    index = {}
    for number, half in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, tiny_folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(half, file)
    (tiny_folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return tiny_folder


@pytest.fixture
def peak_growth() -> Callable[[Callable[[], object]], int]:
    """Bytes by which the process is largest, while a function runs, beyond what it had before."""
    libc = ctypes.CDLL(None)

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def measure(work: Callable[[], object]) -> int:
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # what was freed before must not serve the work
        before = read("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
        except OSError:
            pytest.skip("this system does not measure a process's peak")
        work()
        return read("VmHWM") - before

    return measure
