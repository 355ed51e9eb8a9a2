"""The command line as a user runs it: a process, its output, its exit status. No model is loaded here."""

import socket
import subprocess
import sys
import time

import pytest


def cadenza(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cadenza.server.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("cadenza: ")
    assert all(word in result.stderr for word in words), result.stderr


def test_help_names_every_command() -> None:
    result = cadenza("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("serve", "run", "pull", "models"))


def test_help_does_not_wait_for_heavy_imports() -> None:
    """Timing depends on the machine; what is imported does not."""
    code = (
        "import sys; from cadenza.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_version() -> None:
    assert cadenza("--version").stdout.startswith("cadenza 0.")


@pytest.mark.parametrize(
    "args", [(), ("dance",), ("serve",), ("serve", "x", "--nonsense"), ("serve", "x", "--port", "70000")]
)
def test_misuse_is_status_2(args: tuple[str, ...]) -> None:
    result = cadenza(*args)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "pull"])
def test_a_model_that_is_not_there(command: str) -> None:
    port = ("--port", "0") if command == "serve" else ()
    assert_one_line(cadenza(command, "/no/such/folder", *port), "/no/such/folder")


def test_settings_that_cannot_work() -> None:
    assert_one_line(cadenza("serve", "smollm2", "--port", "0", "--max-num-seqs", "0"), "max_num_seqs")


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        start = time.perf_counter()
        result = cadenza("serve", "/no/such/folder", "--port", str(port))
        assert time.perf_counter() - start < 30
    assert_one_line(result, str(port), "in use")


def test_pull_and_models_agree() -> None:
    pulled = cadenza("pull", "smollm2")
    assert pulled.returncode == 0, pulled.stderr
    path = pulled.stdout.strip()
    listed = cadenza("models")
    assert any(line.startswith("smollm2 ") and line.endswith(path) for line in listed.stdout.splitlines())
