"""Folders of comparisons of anyone: `iprm compare --output` writes nothing through their links."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import iprm
from feature_files import arrays, save

COMPARE = ("compare", "--data", "features", "--path", "features.npz", "--methods", "sum", "--seeds", "1", "--epochs", "1")


@pytest.mark.parametrize("name", ["summary.md", "sum", "sum/seed=0", "sum/seed=0/failed.txt", "sum/seed=0/config.yaml"])
def test_a_comparison_with_a_link_out_of_it_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, arrays())
    (tmp_path / "own").mkdir()
    (tmp_path / "own/failed.txt").write_text("years")
    got = tmp_path / "got"
    (got / name).parent.mkdir(parents=True)
    (got / "settings.json").write_text('{"methods": [], "seeds": []}')
    target = tmp_path / "own" / ("" if "." not in name else "failed.txt")
    (got / name).symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = iprm(tmp_path, *COMPARE, "--output", "got", "--trainer.accelerator", "cpu")
    assert (tmp_path / "own/failed.txt").read_text() == "years"
    assert sorted(tmp_path.rglob("*")) == before
    assert (code, err) == (2, f"iprm: got/{name}: a link to {target}, which is not in got; nothing is written through it\n")
