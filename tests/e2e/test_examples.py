"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_curl(base_url: str) -> None:
    output = run("sh", str(EXAMPLES / "curl.sh"), base_url)
    assert "Paris" in output
    assert "data: [DONE]" in output
    assert '"param":"temperature"' in output


def test_openai_client(base_url: str) -> None:
    output = run(sys.executable, str(EXAMPLES / "openai_client.py"), f"{base_url}/v1")
    whole, rest = output.split("\nThe same, as it is written:\n")
    assert rest.startswith(whole), "the stream says what the whole answer said"
