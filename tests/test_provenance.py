"""Provenance: the commit is that of the source file, and says when it is not the whole truth."""

import subprocess

from loki_attn import provenance


def test_the_commit_is_that_of_the_file_and_says_when_there_are_changes(tmp_path):
    """A file that git does not know, as in an installed package, has no commit."""

    def git(*arguments):
        who = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    commit = provenance._commit.__wrapped__
    source, stranger = tmp_path / "source.py", tmp_path / "stranger.py"
    source.write_text("1")
    stranger.write_text("1")
    git("init", "--quiet")
    git("add", "source.py")
    git("commit", "--quiet", "--no-verify", "--message", "m")
    head = git("rev-parse", "--short=12", "HEAD")
    assert commit(source) == head
    source.write_text("2")
    assert commit(source) == f"{head}+changes"
    assert commit(stranger) is None
    assert commit(tmp_path.parent / "elsewhere.py") is None
