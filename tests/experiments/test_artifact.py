"""The bundle, but for what takes minutes: what is in it, what is not, and when it is not the same."""

import subprocess
import sys
import tarfile

import pytest

from engine.errors import ConfigError
from experiments import artifact, report
from experiments.artifact import AGAIN, CHECKED, Small
from tests.experiments import programs
from tests.experiments.test_report import make

SMALL = Small("a/b", 2)


@pytest.fixture
def tree(tmp_path):
    """Code, what running it left, and the small figure made twice."""
    root = tmp_path / "tree"
    for name in ("engine/__init__.py", "engine/__pycache__/x.pyc", f"{CHECKED}/a/b/data.csv", f"{AGAIN}/a/b/data.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"of {name.rpartition('/')[2]}\n")
    return root


def test_what_is_unpacked_is_what_was_packed(tree, tmp_path):
    """But for what running it has left; nobody's name is in it."""
    bundle = tmp_path / "new/bundle.tar.gz"
    artifact.pack(tree, bundle)
    there = artifact.unpack(bundle.read_bytes(), tmp_path / "there")
    files = {str(f.relative_to(there)): f.read_text() for f in there.rglob("*") if f.is_file()}
    ours = {str(f.relative_to(tree)): f.read_text() for f in tree.rglob("*") if f.is_file()}
    del ours["engine/__pycache__/x.pyc"]
    assert files == ours and len(files) == 3
    with tarfile.open(bundle) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname) for m in tar.getmembers()} == {(0, 0, "", "")}


def test_data_are_compared_byte_by_byte(tree):
    assert SMALL.data(tree, AGAIN) == SMALL.data(tree, CHECKED)
    (tree / AGAIN / "a/b/data.csv").write_text("of data.csv")
    assert SMALL.data(tree, AGAIN) != SMALL.data(tree, CHECKED)


def test_the_guide_names_what_is_there(tmp_path):
    """The commands as they are run for the check, and every figure with its seconds."""
    make(tmp_path / "layerkv/fig1", "layerkv/fig1", [])
    text = artifact.guide(report.load(tmp_path), SMALL, 41.7)
    assert " ".join(SMALL.command(".venv/bin/python", AGAIN)) in text and "One figure, 42 s on " in text
    assert f"cmp {AGAIN}/a/b/data.csv {CHECKED}/a/b/data.csv" in text
    assert (
        "| layerkv/fig1 | 3 | 12.5 | `python -m experiments.reproduce --figure=layerkv/fig1 '--out=my figures'` |"
        in text
    )
    assert "{" not in text


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"-c .* failed: ValueError: too late"):
        artifact.run([sys.executable, "-c", "raise ValueError('too late')"], tmp_path)
    assert artifact.run([sys.executable, "-c", ""], tmp_path) > 0


def test_head_is_what_was_committed():
    known = subprocess.run(["git", "-C", str(artifact.ROOT), "rev-parse", "HEAD"], capture_output=True)
    if known.returncode:
        pytest.skip("no repository")
    from io import BytesIO

    with tarfile.open(fileobj=BytesIO(artifact.head())) as tar:
        assert {"folio/Makefile", "folio/engine/__init__.py"} <= {*tar.getnames()}


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    for flags, message in (
        ((), "holds no figure"),
        ((f"--out={tmp_path}/a.tar.gz",), "is there already; name another, or --overwrite"),
    ):
        code, _, stderr = programs.run("artifact", f"--dir={tmp_path}", f"--out={tmp_path}/b.tar.gz", *flags)
        assert code == 2 and message in stderr and stderr.count("\n") == 1
