"""The examples run as they are."""

import re
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


def test_strategies(base_url: str) -> None:
    """Sections with as many answers as they ask for, ranked ones best first, constrained ones as constrained."""
    output = run(sys.executable, str(EXAMPLES / "strategies.py"), f"{base_url}/v1")
    _, beams, diverse, contrastive, best_of, streamed, why = re.split(r"^\S.*:\n", output, flags=re.M)
    for ranked, count in ((beams, 2), (diverse, 4), (best_of, 2)):
        scores = [float(line.split()[0]) for line in ranked.splitlines()]
        assert len(scores) == count
        assert scores == sorted(scores, reverse=True)
    assert len(contrastive.splitlines()) == 1
    text = streamed.strip().replace("|", "")
    assert re.fullmatch(r"red, (green|yellow),? and blue\. Mixed they make (orange|purple|brown)\.", text)
    assert re.search(r"searched|forced", why)


def test_constraints(base_url: str) -> None:
    """Each section's answer has the form that the section asks for."""
    output = run(sys.executable, str(EXAMPLES / "constraints.py"), f"{base_url}/v1")
    sections = re.split(r"^\S.*:\n", output, flags=re.MULTILINE, maxsplit=5)
    nothing, choice, date, dish, tags, free = sections
    assert nothing == ""
    assert choice.strip() in ("positive", "negative", "neutral")
    assert re.fullmatch(r"  [0-9]{4}-[0-9]{2}-[0-9]{2}\n", date)
    assert re.fullmatch(r"  Dish\(name=.*, course='(starter|main|dessert)', ingredients=\[.*\]\)\n", dish)
    assert re.fullmatch(r"(  [A-Z][a-z]+: (PERSON|PLACE|COMPANY)\n)+", tags)
    assert free.strip()
    assert free.count("<weather>") == free.count("</weather>")
