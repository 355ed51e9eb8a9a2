"""What cannot be served exactly is refused by name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cadenza.models.adapters.layout import layout_of
from cadenza.models.adapters.read import read_adapter
from cadenza.models.errors import ModelError
from cadenza.models.tokenizer import Tokenizer

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny: Callable[..., Any], make_adapter: Callable[..., Any], tmp_path: Path) -> Path:
    """A good one, to be spoilt."""
    made: Path = make_adapter(tiny("llama"), tmp_path, {"target_modules": ["q_proj", "down_proj"]})[0]
    return made


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """None: taken out."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: tensor for name, tensor in tensors.items() if changes.get(name, 0) is not None}, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the model's own weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
        ({"use_qalora": True}, "use_qalora in adapter_config.json is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens in"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora in"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config in"),
        ({"velora_config": {"num_groups": 2}}, "velora_config in"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config in"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config in"),
        ({"megatron_config": {"hidden": 1}}, "megatron_config in"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication in"),
        ({"a_method_of_next_year": 3}, "a_method_of_next_year in"),
        ({"bias": "some"}, "bias 'some' in adapter_config.json is not none, all or lora_only"),
        ({"r": 0}, "r in adapter_config.json has 0, which is no positive integer"),
        ({"r": True}, "r in adapter_config.json has True"),
        ({"lora_alpha": "8"}, "lora_alpha in adapter_config.json has '8', which is no number"),
        ({"r": 10**400}, "r in adapter_config.json has 10+, which is no positive integer"),
        ({"lora_alpha": 10**400}, "lora_alpha in adapter_config.json has 10+, which is no number"),
        ({"lora_alpha": float("nan")}, "lora_alpha in adapter_config.json has nan, which is no number"),
        ({"rank_pattern": [3]}, "rank_pattern in adapter_config.json is no object"),
        (
            {"rank_pattern": {"q_proj(": 4}},
            r"rank_pattern has 'q_proj\(', which is no usable regular expression",
        ),
        (
            {"alpha_pattern": {r"(?:(.)(?!\1)?|..)+[!#]": 4}},
            "alpha_pattern has .*no usable regular expression",
        ),
        ({"use_dora": "yes"}, "use_dora in adapter_config.json is 'yes', not true or false"),
        (
            {"use_dora": True},
            "the adapter has use_dora and no model.layers.0.mlp.down_proj.lora_magnitude_vector",
        ),
        ({"target_parameters": "x"}, "target_parameters in adapter_config.json is no list of names"),
        (
            {"trainable_token_indices": [3, 3]},
            "trainable_token_indices in adapter_config.json names a token twice",
        ),
        (
            {"trainable_token_indices": [-1]},
            "trainable_token_indices in adapter_config.json is no list of token ids",
        ),
        (
            {"trainable_token_indices": [3]},
            "has trainable_token_indices, the adapter no rows for them in model.embed_tokens",
        ),
        ({"r": 6}, "model.layers.0.mlp.down_proj.lora_A has rank 4, adapter_config.json says 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations(
    changes: dict[str, Any], message: str, folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    configure(folder, **changes)
    with pytest.raises(ModelError, match=message):
        read(folder, tiny("llama"))


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"task_type": None},
        {"task_type": "FEATURE_EXTRACTION"},
        {
            "lora_dropout": 0.3,
            "inference_mode": False,
            "revision": "x",
            "auto_mapping": {"base_model_class": "y"},
        },
        {"fan_in_fan_out": True, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"a_method_of_next_year": None, "another": False, "a_third": []},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_changes_nothing_is_accepted(
    changes: dict[str, Any], folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    plain = read(folder, tiny("llama"))
    configure(folder, **changes)
    assert read(folder, tiny("llama")).digest == plain.digest


SPOILT: list[tuple[dict[str, torch.Tensor | None], str]] = [
    (
        {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 20)},
        "q_proj.lora_A has 20 input features, the model's layer has 16",
    ),
    (
        {f"{Q_PROJ}.lora_B.weight": torch.zeros(20, 4)},
        "q_proj.lora_B has 20 output features, the model's layer has 16",
    ),
    ({f"{Q_PROJ}.lora_B.weight": torch.zeros(16, 2)}, "q_proj.lora_B has rank 2, adapter_config.json says 4"),
    ({f"{Q_PROJ}.lora_B.weight": torch.zeros(16)}, "q_proj.lora_B has 1 dimensions instead of 2"),
    (
        {f"{Q_PROJ}.lora_B.weight": None},
        "has model.layers.0.self_attn.q_proj.lora_A.weight and no lora_B.weight",
    ),
    (
        {f"{Q_PROJ}.lora_A.weight": None},
        "has model.layers.0.self_attn.q_proj.lora_B.weight and no lora_A.weight",
    ),
    ({f"{Q_PROJ}.lora_B.bias": torch.zeros(9)}, r"q_proj.lora_B.bias has shape \(9,\), not \(16,\)"),
    ({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(16)}, "q_proj.lora_magnitude_vector without use_dora"),
    (
        {f"{Q_PROJ}.lora_C.weight": torch.ones(16)},
        "model.layers.0.self_attn.q_proj.lora_C.weight is no part of",
    ),
    ({f"{Q_PROJ}.weight": torch.ones(16, 16)}, "q_proj is saved whole and adapted, too"),
    ({f"{Q_PROJ}.base_layer.bias": torch.ones(16)}, "q_proj.bias, which the model has not"),
    (
        {"base_model.model.score.weight": torch.ones(2, 16)},
        "score.weight belongs to no module that the model has",
    ),
    (
        {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 16)},
        "model.layers.7.mlp.up_proj.lora_A.weight belongs to no module",
    ),
    (
        {"base_model.model.model.norm.weight": torch.ones(17)},
        r"model.norm.weight has shape \(17,\), the model's has",
    ),
    (
        {"base_model.model.model.norm.bias": torch.ones(16)},
        "model.norm.bias is no part of an adapter",
    ),
    ({"base_model.model.lm_head.weight": torch.ones(40, 16)}, r"lm_head.weight has shape \(40, 16\)"),
    (
        {
            "base_model.model.norm.weight": torch.ones(16),
            "base_model.model.model.norm.weight": torch.ones(16),
        },
        "two",
    ),
    (
        {f"{Q_PROJ}.lora_A.weight": torch.full((4, 16), torch.nan)},
        "q_proj.lora_A.weight has values that are infinite",
    ),
    (
        {f"{Q_PROJ}.lora_B.weight": torch.full((16, 4), -torch.inf).bfloat16()},
        "q_proj.lora_B.weight has values that",
    ),
    (
        {f"{Q_PROJ}.lora_B.weight": torch.ones(16, 4, dtype=torch.int8)},
        "q_proj.lora_B.weight has type torch.int8",
    ),
    (
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 50)}
        | {"base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(16, 4)},
        "model.embed_tokens.lora_embedding_A has 50 tokens, the model's layer has 48",
    ),
    (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)},
        "adapter_config.json does not say which tokens the rows of model.embed_tokens are",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SPOILT, ids=[message for _, message in SPOILT])
def test_tensors(
    changes: dict[str, torch.Tensor | None],
    message: str,
    folder: Path,
    tiny: Callable[..., Any],
    read: Callable[..., Any],
) -> None:
    edit(folder, changes)
    with pytest.raises(ModelError, match=message):
        read(folder, tiny("llama"))


def test_another_model_is_refused_with_the_first_mismatch(
    folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    with pytest.raises(
        ModelError, match=r"model.layers.0.mlp.down_proj.* belongs to no module that the model has"
    ):
        read(folder, tiny("mixtral"))


def test_a_rank_above_the_servers_is_refused(
    folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match="has rank 4, which is more than --max-lora-rank 2"):
        read(folder, tiny("llama"), max_rank=2)
    assert read(folder, tiny("llama"), max_rank=4).rank == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [10**15, 4]}, r"is damaged: x of shape \(1000000000000000, 4\) does not fit into it"),
        ({"shape": [-4, -4]}, r"is damaged: x of shape \(-4, -4\) does not fit"),
        ({"shape": ["4", 4]}, "is damaged or cannot be read"),
        ({"data_offsets": [-400, 64]}, "is damaged"),
        ({"data_offsets": ["0", 64]}, "is damaged"),
        ({"dtype": "F8_E4M3"}, "x has type torch.float8_e4m3fn"),
        ({"dtype": "C128"}, "adapter_model.safetensors holds tensors of type C128"),
    ],
)
def test_headers_that_lie(
    changes: dict[str, Any], message: str, folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(64)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read(folder, tiny("llama"))


def test_a_file_takes_no_more_memory_than_it_has_bytes(
    folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """Whatever its header says: here, the same bytes many times."""
    entry = {"dtype": "F32", "shape": [1024], "data_offsets": [0, 4096]}
    header = json.dumps({f"x{number}": entry for number in range(50)}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4096)
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is damaged: its tensors overlap"):
        read(folder, tiny("llama"))


def test_a_file_that_memory_has_no_room_for_is_not_read(
    folder: Path, tiny: Callable[..., Any], read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes make files of any size."""
    monkeypatch.setattr("cadenza.models.adapters.files.available_bytes", lambda device: 1000)
    with pytest.raises(ModelError, match=r"has \d+ bytes, and only 1000 of memory are free"):
        read(folder, tiny("llama"))


def test_layers_that_are_not_given_every_token_are_refused(
    folder: Path, tiny: Callable[..., Any], tiny_tokenizer: Tokenizer
) -> None:
    layout = layout_of(tiny("llama"), elsewhere=["model.layers.1.mlp.down_proj"])
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.down_proj cannot be adapted: .* every token"):
        read_adapter(folder, layout, object(), tiny_tokenizer, max_rank=8, fingerprint="")  # type: ignore[arg-type]


def test_a_parameter_of_a_module_that_is_more_is_refused(
    folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]
) -> None:
    name = "base_model.model.model.layers.0.self_attn.sinks"
    save_file({name: torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"parameters of model\.layers\.0\.self_attn cannot be changed"):
        read(folder, tiny("gpt_oss"))


def test_pickles_are_never_opened(folder: Path, tiny: Callable[..., Any], read: Callable[..., Any]) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickle \(adapter_model.bin\) and no adapter_model.safetensors"):
        read(folder, tiny("llama"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "the adapter has no adapter_config.json"),
        ("adapter_config.json", b"{", "adapter_config.json cannot be read as JSON"),
        ("adapter_config.json", b"\xff", "adapter_config.json cannot be read as JSON"),
        ("adapter_config.json", b"[]", "adapter_config.json is no JSON object"),
        ("adapter_model.safetensors", None, "the adapter has no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"\x80\x04K\x01.", "adapter_model.safetensors is damaged"),
        ("adapter_model.safetensors", "cut", "adapter_model.safetensors is damaged: it has"),
        ("adapter_model.safetensors", b"\2" + bytes(7) + b"{}", "adapter_model.safetensors has no tensors"),
        ("tokenizer.json", b"{", "no tokenizer can be loaded from the adapter's folder"),
    ],
)
def test_damaged_files(
    file: str,
    content: bytes | str | None,
    message: str,
    folder: Path,
    tiny: Callable[..., Any],
    read: Callable[..., Any],
) -> None:
    path = folder / file
    whole = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(whole[:-7] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=message) as caught:
        read(folder, tiny("llama"))
    assert str(folder) not in str(caught.value)
    assert "\n" not in str(caught.value)
