"""The page, the plot and the terminal tables say what the results say."""

import io

import yaml
from rich.console import Console

from slimlmm import report, results
from slimlmm.evaluate import Interval
from slimlmm.recipe import Recipe
from test_results import sample, unfinished


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_the_page_of_a_finished_run(tmp_path):
    page = report.write(sample(), tmp_path).read_text()
    assert page == (tmp_path / "README.md").read_text()
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    front = yaml.safe_load(page.split("---\n")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    for text in (
        "17 M -> 4.25 M\nparameters (4.00x fewer)",
        "| parameters | 17 M | 4.25 M | 4.00x |",
        "| latency p50, batch 1 | 87.0 ms | 19.7 ms | 4.42x |",
        "| rows/s, batch 32 | 21.3 | 177.8 | 8.33x |",
        "| all rows | 30 | 93.3 ± ",
        "+13.33 [",
        "| 2 inner.1 | text.ffn 1536→1024 | taylor |",
        "| scratch | ",
        "rounds.png",
        "max_new_tokens=6",
        "`slimlmm compress teacher --data adreview --shrink 4`",
    ):
        assert text in page, text
    assert "None" not in page
    assert "\n\n\n" not in page


def test_the_page_of_an_unfinished_run(tmp_path):
    page = report.write(unfinished(), tmp_path).read_text()
    assert "not finished" in page
    assert "None" not in page
    assert "\n\n\n" not in page
    assert "peak memory" not in page
    assert not (tmp_path / "rounds.png").exists()


def test_terminal_tables():
    text = shown(report.final_table(sample()))
    for part in ("teacher -> final", "4.25 M", "4.42x", "exact match, all rows", "+13.33 [", "same answer"):
        assert part in text, part
    assert "17 M" in shown(report.final_table(unfinished()))
    assert "text.width 576→384" in shown(report.rounds_table(sample()).rich("rounds"))


def test_the_sentence_on_the_promise_names_spared_tasks():
    drops = {"price": Interval(mean=0.005, low=0.0, high=0.01), "slogan": Interval(mean=0.4, low=0.3, high=0.5)}
    change = results.Effect(drop=drops["price"], drop_tasks=drops, agreement=0.9)

    def said(*spared):
        return report.promised(results.promise(change, Recipe(max_drop=1.0, spared_tasks=spared)))

    assert said().endswith("At most 2 points in any task: broken in slogan.")
    assert said("slogan").endswith("in any other task: kept in all; slogan spared, which may lose any.")
    assert said("price", "slogan").endswith(
        "in any other task: there is none; price, slogan spared, which may lose any."
    )


def test_units():
    assert [report.count(n) for n in (None, 12, 1_310_000, 2.35e6, 5.4e9)] == [
        "-",
        "12",
        "1.31 M",
        "2.35 M",
        "5.4 B",
    ]
    assert [report.size(n) for n in (None, 1_500_000, 5.2e9)] == ["-", "1.5 MB", "5.2 GB"]
    assert [report.quantity(n) for n in (None, 12, 4.01e9, 3e15)] == ["-", "12", "4.01 G", "3 P"]
    assert [report.seconds(s) for s in (None, 0.0197, 2.5)] == ["-", "19.7 ms", "2.50 s"]
    assert [report.duration(s) for s in (59, 240, 36_000)] == ["59 s", "4.0 min", "10.0 h"]
    assert [report.times(r) for r in (None, 4.416, 18.06)] == ["-", "4.42x", "18.1x"]
