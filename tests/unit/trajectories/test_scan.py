"""Secrets are taken out, whatever form they are in, and ordinary text is left alone."""

from __future__ import annotations

import base64
import json
import urllib.parse

import pytest

from spider_worker.trajectories.scan import KNOWN, Scanner

SECRET = 'pa$$w0rd/with "quotes"+and=more'


def shapes() -> dict[str, list[str]]:
    """Made-up keys, put together here so that no scanner takes this file for a leak."""
    body = "aB3" * 20
    key = "-----BEGIN RSA PRIVATE " + "KEY-----\n" + ("MIIEow+/" * 8 + "\n") * 3
    return {
        "api-key": [f"sk-{body[:48]}", f"sk-proj-{body}", f"sk-ant-api03-{body}",
                    f"sk-or-v1-{'0f' * 32}"],
        "huggingface-token": [f"hf_{body[:34]}"],
        "github-token": [f"ghp_{body[:36]}", f"ghs_{body[:36]}", f"github_pat_{body[:22]}_{body}"],
        "gitlab-token": [f"glpat-{body[:20]}"],
        "aws-key": ["AKIA" + "Q1W2E3R4T5Z6U7I8"],
        "google-key": ["AIza" + body[:35]],
        "slack-token": [f"xoxb-{body[:24]}", f"xoxp-123-{body[:24]}"],
        "npm-token": [f"npm_{body[:36]}"],
        "stripe-key": [f"sk_live_{body[:24]}"],
        "pypi-token": [f"pypi-AgEI{body}"],
        "jwt": [f"eyJ{body[:20]}.eyJ{body[:30]}.{body[:43]}"],
        "private-key": [key + "-----END RSA PRIVATE KEY-----", key,
                        (key + "-----END RSA PRIVATE KEY-----").replace("\n", "\\n")],
    }  # fmt: skip


CASES = [(kind, key) for kind, keys in shapes().items() for key in keys]


@pytest.mark.parametrize(("kind", "key"), CASES, ids=[kind for kind, _ in CASES])
@pytest.mark.parametrize("around", ["@", "KEY=@\n", '{"token": "@"}', "(see @)", "x @ y"])
def test_what_looks_like_a_key_is_taken_out(kind: str, key: str, around: str) -> None:
    scanner = Scanner()
    text = around.replace("@", key)
    clean = scanner.redact(text, "one")
    assert key not in clean
    assert clean.strip() == text.replace(key.strip(), f"[REDACTED:{kind}]").strip()
    assert scanner.found == {"one": {kind: 1}}
    assert scanner.redact(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer [R]"),
        ('{"authorization": "Basic dXNlcjpwYXNzd29yZDEyMw=="}', '{"authorization": "Basic [R]"}'),
        ("-H 'AUTHORIZATION: token 0123456789abcdef0123'", "-H 'AUTHORIZATION: token [R]'"),
        ('"Authorization\\": \\"Bearer 0123456789abcdef"', '"Authorization\\": \\"Bearer [R]"'),
    ],
)
def test_a_header_loses_its_value_alone(text: str, clean: str) -> None:
    assert Scanner().redact(text) == clean.replace("[R]", "[REDACTED:authorization]")


@pytest.mark.parametrize(
    "text",
    [
        "task-12345678901234567890 risk-2026-01-01-something-long",
        ".sk-toggleable__label-arrow:before { content: x } #sk-container-id-1",
        "hf_hub_download_with_a_long_name_indeed",
        "Authorization: Bearer $TOKEN and Authorization: Bearer <your-token-goes-here>",
        'if "-----BEGIN PRIVATE KEY-----" in text:\n    raise ValueError("a key")\n',
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "diff --git a/xoxo.py b/xoxo.py\nindex 83db48f..bf3a1ce 100644",
        "eyJhbGciOiJIUzI1NiJ9 alone is a header",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    scanner = Scanner()
    assert scanner.redact(text) == text
    assert scanner.found == {}


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        json.dumps(SECRET)[1:-1],
        urllib.parse.quote(SECRET, safe=""),
        *[base64.b64encode(b"a" * n + SECRET.encode() + b"zz").decode() for n in range(3)],
        base64.urlsafe_b64encode(b"user:" + SECRET.encode()).decode(),
    ],
)
def test_a_known_value_is_found_in_every_form(form: str) -> None:
    scanner = Scanner([SECRET])
    clean = scanner.redact(f"API_KEY={form}\nPATH=/bin", "one")
    assert f"[REDACTED:{KNOWN}]" in clean
    assert form not in clean
    assert clean.startswith("API_KEY=")
    assert clean.endswith("\nPATH=/bin")
    assert scanner.found == {"one": {KNOWN: 1}}


def test_the_longer_of_two_values_is_taken_out_whole() -> None:
    scanner = Scanner(["abcdefgh", "abcdefgh-and-more"])
    assert scanner.redact("abcdefgh-and-more") == f"[REDACTED:{KNOWN}]"


def test_placeholders_are_no_secrets() -> None:
    scanner = Scanner(["", "EMPTY", "none"])
    assert scanner.redact("EMPTY is none of our business") == "EMPTY is none of our business"


def test_structures_are_copied_with_their_keys_redacted_too() -> None:
    scanner = Scanner(["topsecretvalue"])
    value = {"topsecretvalue": [1, None, True, {"a": "x topsecretvalue y"}], "b": 2.5}
    clean = scanner.redact(value, "one")
    assert clean == {
        f"[REDACTED:{KNOWN}]": [1, None, True, {"a": f"x [REDACTED:{KNOWN}] y"}],
        "b": 2.5,
    }
    assert "topsecretvalue" in value
    scanner.redact("topsecretvalue", "two")
    assert scanner.found == {"one": {KNOWN: 2}, "two": {KNOWN: 1}}
    assert scanner.counts == {KNOWN: 3}


def test_a_key_in_a_file_viewer_is_taken_out_with_its_line_numbers() -> None:
    lines = [
        "-----BEGIN PRIVATE " + "KEY-----",
        "QUJD" * 16,
        "REVG" * 16,
        "-----END PRIVATE KEY-----",
    ]
    viewed = "".join(f"{number:6}\t{line}\n" for number, line in enumerate(lines, 1))
    cut = viewed[: viewed.index("     4")] + "[cut]\n"
    for text in (viewed, cut, json.dumps(cut)):
        clean = Scanner().redact(text)
        assert "QUJD" not in clean
        assert "REVG" not in clean
    assert Scanner().redact(cut).endswith("[REDACTED:private-key]\n[cut]\n")


def test_json_inside_a_text_stays_json() -> None:
    key = "-----BEGIN PRIVATE " + "KEY-----\n" + "QUJD" * 16 + "\n"
    arguments = json.dumps({"command": f'echo "{key}"', "more": "x"})
    clean = Scanner().redact(arguments)
    assert "QUJD" not in clean
    assert json.loads(clean)["more"] == "x"
