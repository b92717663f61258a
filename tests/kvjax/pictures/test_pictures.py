"""Files of pictures: both themes, valid, the same twice, and drawn again from a folder."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from kvjax._program import run
from kvjax.errors import UserError
from kvjax.pictures import __main__ as program
from kvjax.pictures import draw_pictures, read_trace, write_trace
from tests.kvjax.pictures.made_up import likelihood_row, needle_rows, row, trace


def texts_of(path):
    """What a picture says: matplotlib writes it as a comment beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with all pictures."""
    folder = tmp_path_factory.mktemp("run")
    write_trace(folder, trace())
    rows = [*needle_rows(), likelihood_row("full", 0.0), likelihood_row("int4", 0.25)]
    (folder / "report.json").write_text(json.dumps({"rows": rows}))
    return folder, draw_pictures(folder, rows)


def test_every_picture_is_there_in_both_themes(drawn):
    folder, paths = drawn
    names = [f"{name}.{shade}.svg" for name in ("accuracy", "needle", "kept") for shade in ("light", "dark")]
    assert paths == [folder / "pictures" / name for name in names]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", {"needle(tokens=1024)", "ppl(file=book.txt)", "triattention + int4", "full", "accuracy, %"}),
        ("needle", {"triattention(budget=64)", "+int4", "1,024", "100", "0", "needle: right answers, %"}),
        ("kept", {"layer 0, head 1", "end of the prompt", "tokens seen"}),
    ],
)
@pytest.mark.parametrize("shade", ["light", "dark"])
def test_pictures_are_valid_and_say_what_they_show(drawn, name, shade, expected):
    path = drawn[0] / "pictures" / f"{name}.{shade}.svg"
    tree = ElementTree.parse(path)
    assert tree.getroot().tag.endswith("svg")
    assert expected <= set(texts_of(path))
    # 9 points are the least: matplotlib scales outlines of text from 100 units to its size
    scales = [float(one) for one in re.findall(r"scale\((0\.\d+) -0\.\d+\)", path.read_text())]
    assert min(scales) >= 0.09
    drawing = re.sub(r"base64,[^\"]*", "", path.read_text())
    assert "nan" not in re.sub(r"<!--.*?-->", "", drawing, flags=re.DOTALL).lower()
    assert not re.search(r"\d\d:\d\d:\d\d", drawing)


def test_drawn_again_nothing_changes(drawn, capsys):
    folder, paths = drawn
    before = [path.read_bytes() for path in paths]
    code = run(program.main, usage="", define_flags=lambda values: None, allows_words=True, argv=["p", str(folder)])
    assert (code, capsys.readouterr().out.split()) == (0, list(map(str, paths)))
    assert [path.read_bytes() for path in paths] == before


def test_without_rows_or_a_trace_there_is_nothing_to_draw(tmp_path):
    assert draw_pictures(tmp_path, []) == []
    assert read_trace(tmp_path) is None


@pytest.mark.parametrize("text", ["[", "{}", '{"rows": [{}]}', "[1]"])
def test_a_folder_without_a_report_is_refused(tmp_path, text, capsys):
    for argv in ([], [str(tmp_path / "none")], [str(tmp_path)]):
        (tmp_path / "report.json").write_text(text)
        code = run(program.main, usage="", define_flags=lambda values: None, allows_words=True, argv=["p", *argv])
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (2, 1), error


def test_a_trace_that_is_none_is_refused(tmp_path):
    write_trace(tmp_path, trace())
    (tmp_path / "pictures" / "kept.json").write_text('{"seen": 3}')
    with pytest.raises(UserError, match="is no trace of kept positions; remove it"):
        draw_pictures(tmp_path, [row("hops", "full")])
