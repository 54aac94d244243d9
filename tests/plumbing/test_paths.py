"""What starts must resume, wherever it lies now: claims about plumbing/paths.py.

* A path comes back from where the folder lies; a tree that moves as a whole keeps its
  paths.
* Nobody's home folder is named; bundled data is named by the repository.
* What is no path stays what it is.
"""

import os
import shutil

import pytest

from plumbing.paths import ROOT, located, portable


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with a run, a base and a home that is somewhere else."""
    for folder in ("clone/runs/x", "clone/models/a b", "me/models/q", "clone/~/x"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path


@pytest.mark.parametrize(("path", "text"), [
    ("models/a b", "../../models/a b"), ("models/a b/", "../../models/a b"),
    ("./models/../models/a b", "../../models/a b"), ("runs/x", "."),
    ("runs/x/own", "./own"), ("runs/x/~", "./~"), ("runs/x/..own", "./..own"),
    ("~/x", "../../~/x"), ("../me/models/q", "~/models/q"), ("../me", "~/."),
    (ROOT / "data/tiny", "data/tiny"), (ROOT / "data/tiny/reward", "data/tiny/reward")])
def test_a_path_comes_back_after_its_tree_has_moved(tree, path, text, monkeypatch):
    assert portable(path, "runs/x") == text
    real = os.path.realpath(path)
    assert os.path.realpath(located(text, "runs/x")) == real
    monkeypatch.chdir(tree)
    shutil.move("clone", "moved")
    assert os.path.realpath(located(text, tree / "moved/runs/x")) == real.replace(
        f"{tree}/clone", f"{tree}/moved")


def test_a_folder_that_is_a_link_is_where_it_leads(tree):
    (tree / "link").symlink_to(tree / "clone/runs/x")
    assert portable("models/a b", tree / "link") == "../../models/a b"
    assert located("../../models/a b", tree / "link") == str(tree / "clone/models/a b")


def test_at_home_nobody_is_named(tree):
    home = tree / "me"
    assert portable(home / "models/q", home / "runs/x") == "../../models/q"
    assert portable(home / "models/q", tree / "clone/runs/x") == "~/models/q"
    assert located("~/models/q", "runs/x") == str(home / "models/q")


def test_what_is_no_path_stays_what_it_is(tree):
    for text in ("gold", "Qwen/Qwen2.5-0.5B-Instruct", "/else/where", "runs/reward",
                 "data/none", ""):
        assert located(text, "runs/x") == text
