"""What an operator gives is checked before a server starts: the key, the address, the names."""

from pathlib import Path

import pytest

from minigpt4.errors import UsageError
from minigpt4.serving.settings import check_exposure, is_loopback, known_hosts, read_key

KEY = "correct-horse-battery"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "does not hold a key"), (b"short", "does not hold"), (b"two words here", "does not hold"),
     (b"\xff" * 20, "does not hold"), (b"x" * 600, "does not hold")],
)  # fmt: skip
def test_a_key_file_that_holds_no_key_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_key(tmp_path / "key")


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIGPT4_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("MINIGPT4_API_KEY", "from-the-environment")
    assert read_key(None) == "from-the-environment"
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_key(tmp_path / "key") == KEY
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError):
            read_key(path)
    monkeypatch.setenv("MINIGPT4_API_KEY", "")
    with pytest.raises(UsageError):
        read_key(None)


def test_an_open_address_needs_a_key_or_a_clear_word() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="no API key"):
            check_exposure(host, None, insecure=False)
        check_exposure(host, KEY, insecure=False)
        check_exposure(host, None, insecure=True)
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        check_exposure(host, None, insecure=False)


def test_names_that_a_host_header_may_say() -> None:
    assert known_hosts("127.0.0.1", ["ai.example.org"], None) == {"localhost", "127.0.0.1", "[::1]", "ai.example.org"}
    assert known_hosts("0.0.0.0", [], KEY) is None
    open_names = known_hosts("0.0.0.0", [], None)
    assert open_names is not None and "127.0.0.1" in open_names and "evil.example" not in open_names
    for name in ("http://x", "x:80", "a b", ""):
        with pytest.raises(UsageError):
            known_hosts("127.0.0.1", [name], None)
