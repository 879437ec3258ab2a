"""`python -m refocus`: what it prints, what it returns, and what it says to a caller who made a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refocus.__main__ import load, main
from refocus.errors import CannotExplain
from refocus.report import Report

MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v, scale=0.25):
        scores = q @ k.transpose(-1, -2) * scale
        return scores.softmax(-1) @ v

class Plain(nn.Module):
    def forward(self, x):
        return x + 1

def make():
    return Attention().eval(), tuple(torch.randn(1, 2, 32, 16) for _ in range(3)), {"scale": 0.5}

def trained():
    return Attention(), tuple(torch.randn(1, 2, 32, 16, requires_grad=True) for _ in range(3))

def short():
    return Plain().eval(), (torch.randn(4),)

def wrong():
    return Attention()

def failing():
    raise ValueError("no weights")

def list_args():
    return Attention(), 3, {}
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "some_model.py"
    path.write_text(MODEL)
    return str(path)


def test_explain_prints_the_site(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:make", "--plain"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 attention site: 1 recognised")
    assert "some_model.py:" in out and "softmax" in out


def test_explain_json(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:make", "--json"]) == 0
    report = Report.from_dict(json.loads(capsys.readouterr().out))
    assert report.sites[0].recognized


def test_explain_names_an_engine(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:make", "--json", "--engine", "tiled"]) == 0
    site = Report.from_json(capsys.readouterr().out).sites[0]
    assert site.fused and site.engine == "tiled"


def test_explain_tells_of_training(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine for inference is refused where gradients will be asked for."""
    told = []
    for more in ([], ["--training"]):
        main(["explain", f"{target}:trained", "--json", "--engine", "sdpa", *more])
        told.append(Report.from_json(capsys.readouterr().out).sites[0])
    assert told[0].fused and not told[1].fused and "gradient" in told[1].reason


def test_explain_writes_a_page(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["explain", f"{target}:make", "--html", str(page)]) == 0
    assert "some_model.py" in page.read_text()
    assert main(["explain", f"{target}:make", "--html", str(tmp_path / "no" / "where.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_model_without_attention_is_no_error(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:short"]) == 1
    assert "No attention was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (":wrong", "(model, args, kwargs)"),
        (":failing", "ValueError: no weights"),
        (":list_args", "args as a tuple"),
        (":absent", "Attention, Plain, make, trained, short"),
        ("", "a file and a function are needed"),
        ("x:make", "the file does not exist"),
    ],
)
def test_mistakes(target: str, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target + name]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not captured.out


def test_an_unknown_engine_is_named(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:make", "--engine", "warp"]) == 2
    assert "warp" in capsys.readouterr().err


def test_inputs_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "misfit.py"
    path.write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 4), (torch.randn(3),), {}\n")
    assert main(["explain", f"{path}:make"]) == 2
    assert "refocus:" in capsys.readouterr().err


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(CannotExplain, match="nothing_of_this_name"):
        load(f"{path}:make")
    path = tmp_path / "text.txt"
    path.write_text("")
    with pytest.raises(CannotExplain, match="not a Python source file"):
        load(f"{path}:make")


def test_neighbours_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_model.py").write_text("import torch\nLAYER = torch.nn.Identity()\n")
    (tmp_path / "has_neighbour.py").write_text(
        "from neighbour_of_model import LAYER\ndef make():\n    return LAYER, [1], {}\n"
    )
    model, args, kwargs = load(f"{tmp_path / 'has_neighbour.py'}:make")
    assert type(model).__name__ == "Identity" and args == (1,) and kwargs == {}


def test_emit_prints_sources(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emit", f"{target}:make", "--paths"]) == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == 1 and Path(paths[0]).is_file()
    assert main(["emit", f"{target}:make"]) == 0
    assert "tl." in capsys.readouterr().out


@pytest.mark.slow
def test_as_a_module(target: str) -> None:
    command = [sys.executable, "-m", "refocus", "explain", f"{target}:make"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 attention site" in done.stdout
