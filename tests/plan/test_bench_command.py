"""`jaxscale bench collectives` on emulated devices: every axis and kind is measured, written and read again."""

import pytest

from jaxscale import cli
from jaxscale.config import ConfigError
from jaxscale.plan.collective_costs import Link
from jaxscale.plan.measure_links import BODIES, links_text, load_links


def test_it_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "links.toml"
    words = ["--devices", "8", "--mesh.data", "2", "--sizes", "64", "65536", "--rounds", "3", "--out", str(path)]
    assert cli.main(["bench", "collectives", *words]) == 0
    said = capsys.readouterr().out
    links = load_links(path)
    assert list(links) == ["data", "fsdp"]
    assert all(link.latency >= 0 and link.bandwidth > 0 for link in links.values())
    for kind in BODIES:
        assert said.count(f"  {kind} ") == 2 * 2, said
        assert path.read_text().count(f"\n{kind} = [[64, ") == 2


def test_the_file_has_what_was_fitted(tmp_path):
    points = {"data": [("collective-permute", n, 1e-4 + n / 1e8) for n in (100.0, 1e4, 1e6)]}
    path = tmp_path / "links.toml"
    path.write_text(links_text("two hosts", points, {"data": 2}))
    (found,) = load_links(path).values()
    assert found == Link(pytest.approx(1e-4, rel=1e-3), pytest.approx(1e8, rel=1e-3))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["colectives"], "there is no bench 'colectives'"),
        (["collectives", "--sizes", "64", "64"], "two sizes or more"),
        (["collectives", "--sizes", "2", "64"], "at least 4 bytes"),
        (["collectives", "--rounds", "0"], "--rounds is 0"),
        (["collectives", "--devices", "1"], "collectives need two"),
        (["collectives", "--on", "v5e-256"], "8 cpu devices"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, capsys):
    assert cli.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.toml"
    path.write_text("[data]\ndevices = 2\n")
    with pytest.raises(ConfigError, match="says nothing of links"):
        load_links(path)


def test_help_teaches(capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "jaxscale bench collectives --devices 8" in capsys.readouterr().out
