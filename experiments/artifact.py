"""A bundle for whoever evaluates the artifact: the code, the figures, a report, and how to make them again.

    python -m experiments.artifact --dir=results/figures --out=results/artifact.tar.gz

The bundle holds the files of HEAD, not what has been changed since; the figures under --dir; report.md; ARTIFACT.md,
with the commands and how long they took here; and, under results/check, one small figure made by this very code. With
--check, the default, all of it is tried as the evaluator will: unpacked into a temporary folder, installed into a new
environment, and the small figure made again, whose data.csv must be the same bytes. Ends with one JSON line; exit code
1 if they are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from tempfile import TemporaryDirectory

from absl import flags

from engine.errors import ConfigError
from engine.files import whole_file, write_whole, writing
from experiments import common_flags, environment, report, seeded

flags.declare_key_flag("dir")
flags.declare_key_flag("overwrite")
flags.declare_key_flag("processes")
DEFAULT = "results/artifact.tar.gz"
OUT = flags.DEFINE_string("out", None, f"File to write. Default: {DEFAULT}.", allow_override=True)
CHECK = flags.DEFINE_bool("check", True, "Unpacks, installs and tries it; needs a package index or pip's cache.")

ROOT = Path(__file__).parents[1]
NAME = "folio"  # the folder in the bundle
SMALL = "layerkv/fig1"
FIGURES, AGAIN, CHECKED = "results/figures", "results/again", "results/check"  # in that folder
GUIDE = """# Artifact

Folio, commit {commit}. `README.md` says what it is, `report.md` what was reproduced and what was not, `WORKSPACE.md`
how the code fits together. The figures in `report.md` are under `results/figures`.

## Install

Python 3.11 or newer; a GPU is not needed.

```
python3 -m venv .venv
.venv/bin/python -m pip install -e '.[plots]'
```

## Try

One figure, {seconds:.0f} s on {cores} here. The last command says nothing: the data are the same bytes as those in the
bundle.

```
{small}
cmp {again}/{figure}/data.csv {check}/{figure}/data.csv
```

## Everything

Seconds are those of the machine that made the figures; runs that it had kept from before are not in them.

{times}

All of them, and the report:

```
.venv/bin/python -m experiments.reproduce --figure=all --seeds=3 --out={again}
.venv/bin/python -m experiments.report --dir={again} --out=again.md
```

Runs that have ended are kept under `results/points`, so that the same command goes on after an interruption.
"""


@dataclass(frozen=True)
class Small:
    """The figure that is made on both sides."""

    figure: str = SMALL
    seeds: int = 2
    processes: int | None = None  # at once; None: one per core

    def command(self, python: str, out: str) -> list[str]:
        """Makes it, with the tree as working directory."""
        flags = f"--figure={self.figure}", f"--seeds={self.seeds}", f"--out={out}"
        return [python, "-m", "experiments.reproduce", *flags]

    def make(self, tree: Path, python: str, out: str) -> float:
        """Makes it. Returns seconds."""
        return run([*self.command(python, out), *([f"--processes={self.processes}"] if self.processes else [])], tree)

    def data(self, tree: Path, out: str) -> bytes:
        """What it came to."""
        return (tree / out / self.figure / report.DATA).read_bytes()


def run(command: Sequence[str | Path], cwd: Path) -> float:
    """Runs it without what this process imports from. Returns seconds.

    Raises:
      ConfigError: it fails; the last line that it wrote says why.
    """
    start = time.perf_counter()
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-1]
        raise ConfigError(f"{' '.join(map(str, command))} failed: {last}")
    return time.perf_counter() - start


def head() -> bytes:
    """The files of HEAD, as a tar.

    Raises:
      ConfigError: no git, or no repository.
    """
    try:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar", f"--prefix={NAME}/", "HEAD"]
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise ConfigError(f"an artifact is made of a commit: git archive in {ROOT} failed: {e}") from None


def commit() -> str:
    """Of HEAD."""
    known = environment.commit(ROOT)
    assert known is not None  # `head` has been there
    return known["hash"]


def unpack(bundle: bytes, folder: Path) -> Path:
    """The tree of a tar, compressed or not."""
    with writing(folder), tarfile.open(fileobj=BytesIO(bundle)) as tar:
        tar.extractall(folder, filter="data")
    return folder / NAME


def pack(tree: Path, target: Path) -> None:
    """The bundle of a tree, without what running it has left, and without who made it."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if Path(member.name).name == "__pycache__" else member

    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial, tarfile.open(partial, "w:gz") as tar:
        tar.add(tree, NAME, filter=anonymous)


def fill(tree: Path, figures: Path, small: Small) -> None:
    """Puts the figures, the small one, the report and the guide into a tree of HEAD."""
    made = report.load(figures)
    with writing(tree):
        copytree(figures, tree / FIGURES, ignore=ignore_patterns("report.md"))
    seconds = small.make(tree, sys.executable, CHECKED)
    rmtree(tree / "results/points", ignore_errors=True)  # the evaluator's runs are the evaluator's
    write_whole(tree / "report.md", report.text(report.load(tree / FIGURES), tree))
    write_whole(tree / "ARTIFACT.md", guide(made, small, seconds))


def guide(made: Sequence[report.Made], small: Small, seconds: float) -> str:
    """ARTIFACT.md. `seconds`: what the small figure takes."""
    python = ".venv/bin/python"
    times = [[f.name, str(f.head["seeds"]), f"{f.config['seconds']:g}", f"`{f.command}`"] for f in made]
    return GUIDE.format(
        commit=commit(),
        cores="one core" if small.processes == 1 else f"{os.cpu_count()} cores",
        seconds=seconds,
        small=" ".join(small.command(python, AGAIN)),
        figure=small.figure,
        again=AGAIN,
        check=CHECKED,
        times=report.table(["figure", "seeds", "s", "made by"], times),
    )


def try_out(bundle: Path, small: Small) -> bool:
    """Whether the small figure comes out the same, in an environment that was not there before."""
    with TemporaryDirectory(prefix="artifact-") as folder:
        tree = unpack(bundle.read_bytes(), Path(folder))
        python = str(tree / ".venv/bin/python")
        run([sys.executable, "-m", "venv", ".venv"], tree)
        run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-e", ".[plots]"], tree)
        small.make(tree, python, AGAIN)
        return small.data(tree, AGAIN) == small.data(tree, CHECKED)


def main() -> int:
    """The program."""
    target, figures, small = Path(OUT.value or DEFAULT), Path(report.DIR.value), Small(processes=seeded.PROCESSES.value)
    if target.exists() and not common_flags.OVERWRITE.value:
        raise ConfigError(f"--out={target} is there already; name another, or --overwrite")
    made, tar = report.load(figures), head()
    if other := [f.name for f in made if f.config["commit"] != {"hash": commit(), "dirty": False}]:
        print(f"made by other code than HEAD: {', '.join(other)}")
    with TemporaryDirectory(prefix="artifact-") as folder:
        tree = unpack(tar, Path(folder))
        fill(tree, figures, small)
        pack(tree, target)
    same = try_out(target, small) if CHECK.value else None
    if same is not None:
        print(f"{small.figure} in a new environment: {'the same bytes' if same else 'OTHER DATA'}")
    size = target.stat().st_size
    print(json.dumps({"bench": "artifact", "out": str(target), "bytes": size, "figures": len(made), "same": same}))
    return 1 if same is False else 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
