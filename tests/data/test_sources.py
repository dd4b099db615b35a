"""Texts as people have them: files, folders, globs; lines of JSON; marks and encodings."""

import json

import pytest

from byrote.data.sources import file_documents, find_files


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.txt").write_text("one")
    (tmp_path / "a/two.md").write_text("two")
    (tmp_path / "a/no.bin").write_bytes(b"\xff")
    assert [f.name for f in find_files([str(tmp_path / "a"), str(tmp_path / "**/*.txt")])] == [
        "one.txt",
        "two.md",
    ]
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 text \(byte 3 of"):
        list(file_documents([tmp_path / "bad.txt"], "text"))
    (tmp_path / "a[1].txt").write_text("brackets")
    assert find_files([str(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]
    (tmp_path / "folder.txt").mkdir()
    assert [f.name for f in find_files([str(tmp_path)])] == ["one.txt", "two.md", "a[1].txt", "bad.txt"]
    with pytest.raises(ValueError, match="no text file matches ''"):
        find_files([""])


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_lines_of_json_as_people_have_them(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [
        json.dumps({"text": text}, ensure_ascii=False).encode()
        for text in ("one", f"two{SEPARATORS[:3]}three", "\u6c34")
    ]
    both = [json.dumps({"text": SEPARATORS}).encode(), f'{{"text": "{SEPARATORS}"}}'.encode()]  # escaped, and not
    path.write_bytes(b"\xef\xbb\xbf" + records[0] + b"\r\n\r\n  \n" + b"\n".join([records[1], *both, records[2]]))
    found = list(file_documents([path], "text"))
    assert [text.text for text in found] == ["one", f"two{SEPARATORS[:3]}three", SEPARATORS, SEPARATORS, "\u6c34"]
    assert [text.name for text in found] == [f"{path}#{number}" for number in (1, 4, 5, 6, 7)]


BAD_LINES = {
    "cut": (b'{"text": "unfin', "is no JSON"),
    "null": (b'{"text": null}', "'text' is null and no text"),
    "a number": (b'{"text": 17}', "'text' is 17 and no text"),
    "nested": (b'{"text": {"text": "a"}}', "'text' is .* and no text"),
    "a list": (b'["text"]', "is no object but"),
    "a bare text": (b'"text"', "is no object but"),
    "nothing": (b"null", "is no object but null"),
    "too deep": (b"[" * 200_000, "is no JSON"),
    "half of a pair": (b'{"text": "ab\\ud800"}', r"character 2 is \\ud800, half of a pair"),
    "another key": (b'{"content": "a"}', "has no field 'text'; it has .*--text-field"),
    "Windows-1252": (b'{"text": "\xe9"}', r"is not UTF-8 text \(byte 24 of the file\)"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"{path} line 2:? {message}"):
        list(file_documents([path], "text"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "py"])
def test_text_of_wide_characters_is_named(tmp_path, encoding, suffix):
    path, mark = tmp_path / f"x.{suffix}", "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + '{"text": "a"}\n').encode(encoding))
    with pytest.raises(ValueError, match=rf"{path}( line 1)? is UTF-(16|32) text; convert it to UTF-8 first"):
        list(file_documents([path], "text"))


def test_a_mark_of_utf_8_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone")
    assert [found.text for found in file_documents([tmp_path / "x.txt"], "text")] == ["one"]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\xff")
    with pytest.raises(ValueError, match="byte 6 of"):
        list(file_documents([tmp_path / "x.txt"], "text"))
