"""What a process prints has lost its secrets, whoever put them there."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from sft_dist.cli.main import main
from sft_dist.redaction import Redactor, hiding_secrets

BODY = "abcdefghijklmnopqrstuvwxyz0123456789"


SECRETS = (
    f"hf_{BODY}", f"ghp_{BODY}", f"sk-{BODY}", "AKIAABCDEFGHIJKLMNOP", f"Authorization: Bearer {BODY}",
    f"https://me:{BODY}@example.com/d", f"https://b.example.com/d?X-Amz-Signature={BODY}&part=1",
    f"https://a.example.com/d?sig={BODY}", f"https://a.example.com/d?access_token={BODY}",
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_key_is_hidden(secret: str) -> None:
    told = Redactor({})(f"GET {secret} failed with 401")
    assert BODY not in told and "AKIAABC" not in told
    assert told.startswith("GET ") and told.endswith(" failed with 401") and "[hidden]" in told


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "SENTRY_DSN", "DATABASE_URL", "PGPASSWORD", "MYSQL_PWD",
     "AZURE_STORAGE_CONNECTION_STRING"],
)  # fmt: skip
def test_the_values_of_secret_variables_are_hidden(name: str) -> None:
    assert Redactor({name: "no shape at all"})("before no shape at all after") == "before [hidden] after"


def test_ordinary_words_stay(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch()
    environment = {
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "MY_KEY": "short",
        "HF_TOKEN_PATH": str(token),
        "PWD": "/srv/a/folder",
        "OLDPWD": "/srv/a/folder",
        "A": "b",
    }
    text = f"false-and-long short {token} /srv/a/folder b 12:30 s3://bucket/key?versionId=3 step 1/12 loss 4.6"
    assert Redactor(environment)(text) == text


def test_a_secret_may_begin_as_a_path_does() -> None:
    assert Redactor({"AWS_SECRET_ACCESS_KEY": "/abcd+efgh/ijkl"})("id /abcd+efgh/ijkl.") == "id [hidden]."


KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END RSA PRIVATE KEY-----"


def test_a_private_key_is_hidden_as_a_whole() -> None:
    assert Redactor({})(f"read {KEY} and {KEY}.") == "read [hidden] and [hidden]."
    assert Redactor({})(f"read {KEY[:60]}") == "read [hidden]"


def test_a_private_key_is_hidden_line_by_line_and_what_follows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with hiding_secrets():
        for line in KEY.splitlines():
            print(line)
        print("told")
        print(KEY.splitlines()[0])
        for number in range(200):  # no end comes: not all that is ever said is lost
            print("line", number)
    out = capsys.readouterr().out
    assert BODY not in out and out.startswith("[hidden]\ntold\n[hidden]") and out.endswith("line 199\n")


def test_log_handlers_that_were_there_before_are_covered_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(sys.stderr)
    before = handler.stream
    logger.addHandler(handler)
    try:
        with hiding_secrets():
            logger.warning("token hf_%s", BODY)
            late = logging.StreamHandler(sys.stdout)
            logger.addHandler(late)
        assert handler.stream is before and late.stream is sys.stdout
    finally:
        logger.handlers.clear()
    err = capsys.readouterr().err
    assert "token [hidden]" in err and BODY not in err


def test_streams_warnings_and_threads_are_covered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", BODY)

    def fail() -> None:
        raise RuntimeError(BODY)

    with hiding_secrets():
        sys.stderr.write(warnings.formatwarning(BODY, UserWarning, "file", 1))
        print(BODY)
        print(BODY, file=sys.stderr)
        thread = threading.Thread(target=fail)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", threading.__excepthook__)
            thread.start()
            thread.join()
    out, err = capsys.readouterr()
    assert BODY not in out + err and (out + err).count("[hidden]") >= 4


def test_a_foreign_error_of_a_command_is_told_without_its_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> int:
        raise OSError(f"https://me:{BODY}@example.com does not answer")

    monkeypatch.setattr("sft_dist.cli.main._run", fail)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "https://[hidden]@example.com does not answer" in err and "Traceback" in err and BODY not in err


def test_a_workers_traceback_is_told_without_its_secrets() -> None:
    program = (
        "import sys\n"
        "from sft_dist.resilience.ending import run_and_end\n"
        "def main():\n"
        "    raise OSError('token ' + sys.argv[1])\n"
        "run_and_end(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, f"hf_{BODY}"], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: token [hidden]" in done.stderr and BODY not in done.stderr
