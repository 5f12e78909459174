"""The tables in docs/results.md are those of the files in results/, and its figures come from nowhere else."""

import re
import sys
from pathlib import Path

import pytest

import envs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "results"))

import probes  # noqa: E402
import study  # noqa: E402

DOCS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "results").glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tables_of_the_docs_are_drawn_from_the_files(path, tmp_path, capsys):
    """Catches a figure that was typed, or a file of rows that was made again without its table."""
    options = {}
    if path.stem.startswith("recovery"):  # a panel of its own
        probes.fresh_repositories(str(tmp_path / "fresh.json"))
        options = {"repos": tmp_path / "fresh.json"}
    study.draw(path, envs.make(path.stem.split("-")[1], **options))
    drawn = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    sections = re.findall(rf"`results/{re.escape(path.name)}`[^|]*\n\n((?:\|.*\n)+)", DOCS)
    assert sections, "a file that no table is drawn from"
    for line in "".join(sections).splitlines():
        assert " ".join(line.split()) in drawn or set(line) <= set("|- ")


def test_success_by_amount_of_data(tmp_path, monkeypatch):
    """Catches a file that is left out, and seeds or rows that are mixed."""
    drawn = {}
    monkeypatch.setattr(study, "draw_curves", lambda curves, out, **more: drawn.update(curves))
    rows = (ROOT / "results" / "reflection-taxi-20-test.jsonl").read_bytes()
    for amount in (20, 50):
        (tmp_path / f"amount-taxi-{amount}-test.jsonl").write_bytes(rows)
    study.picture_of_amounts(tmp_path / "amount-taxi-20-test.jsonl", envs.make("taxi"), "out.png")
    points = drawn["with reflection, SFT + RL"]
    assert set(points) == {20, 50} and points[20] == points[50] and len(points[20]) == 5
    some = [line for line in rows.splitlines(keepends=True) if b"-s0" in line]
    (tmp_path / "amount-taxi-10-test.jsonl").write_bytes(b"".join(some))
    study.picture_of_amounts(tmp_path / "amount-taxi-20-test.jsonl", envs.make("taxi"), "out.png")
    assert drawn["with reflection, SFT + RL"] == {10: points[20][:1], 20: points[20][:1], 50: points[20][:1]}
    assert f"{sum(points[20]) / 5:.1%}" == "86.8%" and not {"random", "expert"} & set(drawn)


def test_figures_of_the_readme_are_those_of_the_docs():
    """Catches a README whose table was not changed with the results."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (?:taxi|AutoExplore|ALFWorld), with.*", readme, re.M)
    assert len(lines) == 6
    for line in lines:
        for cell in line.split("|")[2:-1]:
            if not cell.strip():
                continue
            success, *interval = re.findall(r"\d+\.\d", cell)
            pattern = rf"\| +{success}% \| +" + (rf"\[{interval[0]}%, {interval[1]}%\] \|" if interval else "")
            assert re.search(pattern, DOCS), cell
