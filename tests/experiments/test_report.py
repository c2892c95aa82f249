"""The report on figures made by hand: what counts, what was missed and why, and links that lead somewhere."""

import json
import re

import pytest

from experiments.figures.base import ARITHMETIC, FITTED, MEASURED, PREDICTED, Verdict
from tests.experiments import programs

COMMIT = {"hash": "0123456789abcdef", "dirty": False}


def make(folder, name, verdicts, picture=True, notes=(), commit=COMMIT):
    """A figure's files, as `reproduce` writes them."""
    folder.mkdir(parents=True)
    head = {"figure": name, "title": f"Title of {name}", "source": "A paper, figure 1", "about": "What is run."}
    head |= {"executor": "sim", "seeds": 3, "notes": [*notes]}
    given = [vars(v) | {"counts": v.counts} for v in verdicts]
    (folder / "verdict.json").write_text(json.dumps(head | {"verdicts": given}))
    command = ["/some/where/python", "-m", "experiments.reproduce", f"--figure={name}", "--out=my figures"]
    (folder / "config.json").write_text(json.dumps(head | {"seconds": 12.5, "command": command, "commit": commit}))
    (folder / "data.csv").write_text("")
    if picture:
        (folder / "figure.png").write_bytes(b"")


@pytest.fixture
def report(tmp_path):
    """Two figures; the text of the report and where it is."""
    make(
        tmp_path / "my figures/zeta", "zeta.py:Z",
        [Verdict("z", MEASURED, ">= 1", "2", True), Verdict("nobody", MEASURED, ">= 1", "no point", None)],
        picture=False, notes=["assumed so"], commit=None,
    )  # fmt: skip
    make(
        tmp_path / "my figures/layerkv/fig1", "layerkv/fig1",
        [
            Verdict("sizes", ARITHMETIC, "", "1", True),
            Verdict("fit", FITTED, "0.5 to 2", "3", False, "never said | so"),
            Verdict("good", PREDICTED, "0.5 to 2", "1", True),
            Verdict("bad", PREDICTED, "0.5 to 2", "3", False, "the load is 0.9"),
            Verdict("odd", PREDICTED, "0.5 to 2", "3", False),
        ],
    )  # fmt: skip
    out = tmp_path / "elsewhere/report.md"
    out.parent.mkdir()
    code, stdout, stderr = programs.run("report", "--dir=my figures", f"--out={out}", cwd=tmp_path)
    assert code == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["passed"] == {"arithmetic": "1 of 1", "fitted": "0 of 1", "predicted": "1 of 3", "measured": "1 of 1"}
    return out.read_text(), out


def rows(text, first):
    """The cells of the table rows that begin so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


def test_only_what_counts_is_summed_up(report):
    """Predicted and measured: 2 of 4 that could be judged."""
    text, _ = report
    assert "Verdicts reproduced: **2 of 4**." in text
    counts = {kind: rows(text, kind)[0][2:] for kind in ("arithmetic", "fitted", "predicted", "measured")}
    assert counts["arithmetic"] == ["no", "1", "0", "0"] and counts["fitted"] == ["no", "0", "1", "0"]
    assert counts["predicted"] == ["yes", "1", "2", "0"] and counts["measured"] == ["yes", "1", "0", "1"]
    assert rows(text, "layerkv/fig1") == [["layerkv/fig1", "Title of layerkv/fig1", "1 of 1", "0 of 1", "1 of 3", ""]]
    assert text.index("## layerkv/fig1") < text.index("## zeta.py:Z")  # ours first


def test_verdicts_say_what_became_of_them(report):
    text, _ = report
    assert rows(text, "bad") == [["bad", "predicted", "0.5 to 2", "3", "missed"]]
    assert [rows(text, name)[0][-1] for name in ("sizes", "fit", "good", "z", "nobody")] == [
        "passed", "missed", "passed", "passed", "-",
    ]  # fmt: skip
    assert "* Missed: bad: the load is 0.9." in text and "* Missed: odd: no explanation was found." in text
    assert text.count("* Missed:") == 3 and "* assumed so" in text


def test_links_lead_from_the_report_to_files(report):
    text, out = report
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) == 3 and all((out.parent / link.replace("%20", " ")).exists() for link in links)
    assert sum(link.endswith(".png") for link in links) == 1 and not any(link.startswith("/") for link in links)


def test_the_command_is_one_for_any_machine(report):
    text, _ = report
    assert "\npython -m experiments.reproduce --figure=layerkv/fig1 '--out=my figures'\n" in text
    assert "12.5 s, commit 0123456789ab:" in text and "commit unknown:" in text and "/some/where" not in text


def test_bad_input_is_one_line(tmp_path):
    code, _, stderr = programs.run("report", f"--dir={tmp_path}")
    assert code == 2 and stderr.count("\n") == 1
    assert f"--dir={tmp_path} holds no figure: python -m experiments.reproduce --figure=all makes them" in stderr
    make(tmp_path / "a", "a", [])
    (tmp_path / "a/config.json").write_text("{")
    code, _, stderr = programs.run("report", f"--dir={tmp_path}")
    assert code == 2 and stderr.count("\n") == 1 and "a/config.json cannot be read" in stderr
