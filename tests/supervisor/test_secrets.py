"""The job's token: in a file for its owner only, never shown."""

import os
import pickle
import subprocess
import sys

import pytest

from jaxscale.supervisor import job_token
from jaxscale.supervisor.job_token import TokenError, child_environment, new_token, read_token, write_token


@pytest.fixture
def written(tmp_path):
    token = new_token()
    write_token(tmp_path / "token", token)
    return tmp_path / "token", token


def test_what_was_written_is_read(written):
    path, token = written
    assert read_token(path) == token
    assert read_token(environment=child_environment(path)) == token
    assert new_token() != token
    assert len(token.secret) == 32


def test_the_file_is_for_its_owner_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        write_token(tmp_path / "token", new_token())
    finally:
        os.umask(before)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_a_child_finds_it(written):
    path, token = written
    code = "from jaxscale.supervisor.job_token import read_token; print(read_token())"
    environment = os.environ | child_environment(path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{token}\n"
    assert token.secret.hex() not in done.stdout


def test_printing_shows_nothing(written):
    _, token = written
    for text in (repr(token), str(token), f"{token!r:>10} {[token]} { {'token': token} }"):
        assert token.secret.hex() not in text
        assert repr(token.secret) not in text
    assert pickle.loads(pickle.dumps(token)) == token


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_a_file_that_others_may_use_is_refused(written, mode):
    path, token = written
    path.chmod(mode)
    with pytest.raises(TokenError, match=rf"others may use the file \(mode {mode:04o}\)") as caught:
        read_token(path)
    assert token.secret.hex() not in str(caught.value)


def test_a_file_of_another_user_is_refused(written, monkeypatch):
    path, _ = written
    monkeypatch.setattr(job_token.os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(TokenError, match="belongs to user"):
        read_token(path)


@pytest.mark.parametrize("text", ["", "00", "x" * 64, "0" * 62, "0" * 66, "ü" * 32, "0" * 5000])
def test_what_is_no_token(tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TokenError, match="holds no job token") as caught:
        read_token(path)
    assert caught.value.__cause__ is None
    assert not text or text not in str(caught.value).replace(str(path), "")


def test_links_folders_and_pipes_are_refused(written, tmp_path):
    path, _ = written
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(TokenError, match="symbolic link"):
        read_token(tmp_path / "link")
    for name in ("pipe", "."):
        with pytest.raises(TokenError, match="no plain file"):
            read_token(tmp_path / name)
    with pytest.raises(TokenError, match="cannot be read: No such file"):
        read_token(tmp_path / "missing")


def test_without_the_variable_the_error_names_it():
    with pytest.raises(TokenError, match="JAXSCALE_TOKEN_FILE is not set"):
        read_token(environment={})


def test_a_token_is_never_written_over(written):
    path, token = written
    with pytest.raises(TokenError, match="is there already"):
        write_token(path, new_token())
    assert read_token(path) == token
