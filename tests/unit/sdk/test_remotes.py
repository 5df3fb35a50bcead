"""Addresses of repositories: what is one, and which ones are taken."""

from __future__ import annotations

import pytest

from spider_sdk.remotes import is_remote, remote_problem, remote_server


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("https://github.com/a/b.git", ("https", "github.com", 443)),
        ("HTTP://git.example:8080/b", ("http", "git.example", 8080)),
        ("https://[2001:db8::1]/b", ("https", "2001:db8::1", 443)),
        ("ssh://git@git.example:2222/b", ("ssh", "git.example", 2222)),
        ("git@github.com:a/b.git", ("ssh", "github.com", 22)),
    ],
)
def test_what_is_taken(address: str, server: tuple[str, str, int]) -> None:
    assert is_remote(address)
    assert remote_problem(address) is None
    assert remote_server(address) == server


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file:///etc/x.git", "by https, http or ssh; give a folder"),
        ("git://host/x", "by https, http or ssh"),
        ("ext::sh -c 'touch /tmp/x'", "by https, http or ssh"),
        ("https:///x.git", "names no host"),
        ("ssh://-oProxyCommand=x/y", "names no host"),
        ("https://host:port/x", "is no address"),
        ("https://[::1/x", "is no address"),
        ("https://token@host/x.git", "kept with the job: host; leave it out"),
        ("ssh://git:word@host/x.git", "kept with the job"),
    ],
)
def test_what_is_not(address: str, said: str) -> None:
    assert is_remote(address), "and so it is taken for no path"
    assert said in str(remote_problem(address))


@pytest.mark.parametrize("path", ["repos/x", "/repos/x", "../x.bundle", "~/x", "a@b/c", "input:ab"])
def test_a_path_is_none(path: str) -> None:
    assert not is_remote(path)
