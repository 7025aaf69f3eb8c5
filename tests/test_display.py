"Tables of texts: escaped, in columns, whoever wrote what stands in them."

from finetune_nb.config import ConfigError
from finetune_nb.display import html_table, markdown_table, md_cell, notebook_shell, text_table, visible


def test_html_is_escaped_and_rows_without_a_head_have_a_name():
    page = html_table(["<i>", "b"], [["<b>x</b>", "1"], ["y", "&"]], bold=[1])
    assert "<i>" not in page and "<b>" not in page and "&lt;b&gt;x" in page and "&amp;" in page
    assert page.count("<th") == 3 and page.count("<td") == 4 and page.count("font-weight:bold") == 1  # thead is one of the three
    assert html_table((), [["name", "value"]]).count("<th ") == 1


def test_lines_of_text_have_one_width():
    assert text_table(["a", "bb"], [["long", "1"], ["x", ""]]) == ["a     bb", "long  1", "x"]
    assert text_table(["a"], []) == ["a"]


def test_a_cell_of_markdown_is_one_line():
    assert md_cell("a\n| <b>\tc & d") == "a \\| &lt;b&gt; c &amp; d"


def test_nothing_steers_a_terminal_or_turns_the_writing():
    evil, shown = "\x1b[2J\x9b\x07\r\u202e\u2067\u2028\ud800", r"\x1b[2J\x9b\x07\r\u202e\u2067\u2028\ud800"
    assert visible(evil) == shown and visible("ä 漢\n\t\u00a0\U0001f469\u200d\U0001f52c") == "ä 漢\n\t\u00a0\U0001f469\u200d\U0001f52c"
    assert shown in text_table(["a"], [[evil]])[1] and "\x1b" not in md_cell(evil)
    assert str(ConfigError(f"x: {evil}", 1)) == str((f"x: {shown}", 1)) and str(ConfigError(evil)) == shown


def test_markdown_means_nothing_but_itself():
    table = markdown_table(["h"], [["[a](b) `c` *d* ![e](f)"]])
    assert table.splitlines()[2] == r"| \[a\](b) \`c\` \*d\* !\[e\](f) |"


def test_outside_a_notebook_there_is_no_shell(monkeypatch):
    assert notebook_shell() is None
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": 1})())
    assert notebook_shell().kernel == 1
