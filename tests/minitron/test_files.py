"""Files of every kind read as they are: the same records in the same order, from any place on, and every damage said in one line."""

import csv
import gzip
import json
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from minitron.formats.blocks import Block, records
from minitron.formats.files import blocks_of, cut_of, files_behind, matching_files, text_bytes
from minitron.formats.kinds import stem_of
from minitron.formats.streams import CHUNK_BYTES

RECORDS = [{"text": f'Document {n}, «ünï» 🙂\n\tand, "two" lines. ' + "word " * (n * 7 % 13), "id": str(n), "note": "" if n % 3 else "x"} for n in range(60)]
JSON_LINE_KINDS = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst")
JSON_KINDS = (".json", ".json.gz", ".json.zst", ".lines.json", ".pretty.json", ".objects.json", ".held.json")
TABLE_KINDS = (".csv", ".tsv", ".csv.gz", ".tsv.zst", ".parquet", ".arrow", ".stream.arrow", ".feather", ".saved")
KINDS = (*JSON_LINE_KINDS, *JSON_KINDS, *TABLE_KINDS)
BLOCK_BYTES = 700  # several blocks in every file


def packed(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_of(path: Path, rows: list[dict]) -> str:
    if ".lines" in path.name:
        return lines_of(rows)
    if ".objects" in path.name:
        return "\n".join(json.dumps(row, indent=2) for row in rows)
    if ".held" in path.name:
        return json.dumps({"version": 1, "data": rows, "tags": ["a"]})
    return json.dumps(rows, ensure_ascii=False, indent=2 if ".pretty" in path.name else None) + "\n "


def write_csv(path: Path, rows: list[dict]) -> Path:
    plain = path.with_name("plain")
    with plain.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader(), writer.writerows(rows)
    return packed(path, plain.read_bytes())


def write_arrow(path: Path, table: pyarrow.Table, rows: int = 20) -> Path:
    new = pyarrow.ipc.new_stream if ".stream" in path.name or ".saved" in str(path) else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_saved(path: Path, table: pyarrow.Table) -> Path:
    """What `Dataset.save_to_disk(num_shards=2)` writes, so far as it is read."""
    path.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(table) // 2
    write_arrow(path / names[0], table.slice(0, half)), write_arrow(path / names[1], table.slice(half))
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}))
    (path / "dataset_info.json").write_text("{}")
    return path


def write(path: Path, rows: list[dict]) -> Path:
    """These rows as a file of the kind that the path's name says."""
    name = path.name
    if ".jsonl" in name or ".ndjson" in name:
        return packed(path, (lines_of(rows[:20]) + "\n  \r\n" + lines_of(rows[20:])).encode())
    if ".json" in name:
        return packed(path, json_of(path, rows).encode())
    if ".csv" in name or ".tsv" in name:
        return write_csv(path, rows)
    table = pyarrow.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=25)
    elif name.endswith(".saved"):
        write_saved(path, table)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, str(path), compression="lz4", chunksize=25)
    else:
        write_arrow(path, table)
    return path


def read(path: Path, start: dict | None = None, **options) -> list:
    return [record for block in blocks_of(path, start, **{"block_bytes": BLOCK_BYTES, **options}) for _, record in records(block)]


def refusal(path: Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        read(path, **options)
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {kind: write(folder / f"corpus{kind}", RECORDS) for kind in KINDS}


# Records.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_records_in_the_same_order(kind, corpora):
    assert read(corpora[kind]) == RECORDS
    assert read(corpora[kind]) != RECORDS[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_every_place_with_exactly_the_rest(kind, corpora):
    blocks = list(blocks_of(corpora[kind], block_bytes=BLOCK_BYTES))
    assert len(blocks) > 3 and [block.first for block in blocks] == list(np.cumsum([0] + [block.count for block in blocks])[:-1])
    for block in blocks:
        place = json.loads(json.dumps(block.place))
        for block_bytes in (BLOCK_BYTES, 300, 10**6):
            assert read(corpora[kind], place, block_bytes=block_bytes) == RECORDS[block.first + block.count :]
    assert sum(block.num_bytes for block in blocks) <= text_bytes(corpora[kind])[0]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".feather"])
def test_the_bytes_of_all_blocks_are_the_files(kind, corpora):
    assert sum(block.num_bytes for block in blocks_of(corpora[kind], block_bytes=BLOCK_BYTES)) == pytest.approx(corpora[kind].stat().st_size, abs=4)


@pytest.mark.parametrize("kind", KINDS)
def test_wanted_records_are_those_of_all_at_their_positions(kind, corpora):
    for block in blocks_of(corpora[kind], block_bytes=BLOCK_BYTES):
        wanted = set(range(0, block.count, 2))
        assert list(records(block, wanted)) == [(position, record) for position, record in records(block) if position in wanted]
        assert list(records(block, [])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_goes_to_another_process_with_no_more_than_its_own_rows(kind, corpora):
    for block in blocks_of(corpora[kind], block_bytes=BLOCK_BYTES):
        sent = pickle.dumps(block)
        assert list(records(pickle.loads(sent))) == list(records(block))
        assert len(sent) < 4 * BLOCK_BYTES + 2000


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_packed_files_one_behind_another_are_read_as_one(kind, tmp_path):
    halves = [write(tmp_path / f"half{number}{kind}", rows).read_bytes() for number, rows in enumerate((RECORDS[:30], RECORDS[30:]))]
    (tmp_path / f"both{kind}").write_bytes(b"".join(halves))
    assert read(tmp_path / f"both{kind}") == RECORDS == read(tmp_path / f"both{kind}", block_bytes=10**6)


def test_a_part_of_a_large_batch_is_sent_without_the_rest_of_it(tmp_path):
    path = write_arrow(tmp_path / "large.arrow", pyarrow.Table.from_pylist(RECORDS * 40), rows=10_000)
    sizes = [len(pickle.dumps(block)) for block in blocks_of(path, block_bytes=20_000)]
    assert len(sizes) > 5 and max(sizes) < 25_000 < path.stat().st_size / 4


def test_a_number_is_not_taken_for_whole_where_what_is_read_ends(tmp_path):
    (tmp_path / "numbers.json").write_text(json.dumps([123456, 78, -1.5e10] * 9))
    assert [value for block in blocks_of(tmp_path / "numbers.json", block_bytes=3) for value in block.payload] == [123456, 78, -1.5e10] * 9


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".held.json", ".csv", ".parquet", ".saved"])
def test_the_size_of_blocks_does_not_change_what_is_read(kind, corpora):
    for block_bytes in (1, 64, 333, 10**6):
        assert read(corpora[kind], block_bytes=block_bytes) == RECORDS


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_columns_that_are_not_wanted_are_not_read(kind, corpora):
    asked = []
    rows = read(corpora[kind], columns=lambda fields: asked.append(fields) or ["id"])
    assert rows == [{"id": row["id"]} for row in RECORDS] and asked[0] == ["text", "id", "note"]


def test_a_mistake_that_the_chooser_of_columns_finds_is_said_in_its_own_words(corpora):
    def columns(fields: list[str]) -> list[str]:
        raise ValueError(f"data.text_field is 'body'; it must be one of {fields}")

    assert refusal(corpora[".parquet"], columns=columns).startswith("data.text_field is 'body'")


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_field_that_is_null_at_first_or_changes_its_type_does_not_matter(kind, tmp_path):
    rows = [{"text": "word " * 20, "note": None} for _ in range(300)] + [{"text": "end", "note": "x"}, {"text": "", "note": {"deep": [1]}}, {"note": 7}]
    assert read(write(tmp_path / f"late{kind}", rows)) == rows


def test_a_line_that_is_not_wanted_is_not_parsed(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": two}\n{"text": "three"}\n')
    (block,) = blocks_of(tmp_path / "bad.jsonl")
    assert [position for position, _ in records(block, {0, 2})] == [0, 2]
    with pytest.raises(ValueError, match=r"^data.files: bad.jsonl, document 2 is no JSON \(Expecting value at character 10\)"):
        list(records(block))


def test_an_object_that_is_a_document_itself_is_not_taken_for_a_list_of_documents(tmp_path):
    for row in ({"messages": [{"role": "user", "content": "Hi"}]}, {"text": "one", "notes": [{"a": 1}]}, {"a": [{"b": 1}], "c": [{"d": 2}]}):
        (tmp_path / "one.json").write_text(json.dumps(row))
        assert read(tmp_path / "one.json") == [row]
    (tmp_path / "one.json").write_text('{"data": [{"body": "a"}, {"body": "b"}]}')
    assert read(tmp_path / "one.json") == [{"body": "a"}, {"body": "b"}]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".json.gz", ".csv.zst"])
def test_a_byte_order_mark_is_passed_over(kind, tmp_path):
    path = write(tmp_path / f"marked{kind}", RECORDS)
    plain = write(tmp_path / f"marked.plain{kind.removesuffix('.gz').removesuffix('.zst')}", RECORDS).read_bytes()
    packed(path, b"\xef\xbb\xbf" + plain)
    blocks = list(blocks_of(path, block_bytes=BLOCK_BYTES))
    assert read(path) == RECORDS
    assert all(read(path, block.place) == RECORDS[block.first + block.count :] for block in blocks)


# Plain text.

PARAGRAPHS = "".join(f"Paragraph {n}. " + "Some words, ü. " * (n % 40) + ("\r\n" if n % 5 else "\n\n") + ("\n \n" if n % 7 == 0 else "") for n in range(600))


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".md", ".text", ".txt.gz", ".raw.zst"])
def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(suffix, tmp_path):
    path = packed(tmp_path / f"wiki{suffix}", PARAGRAPHS.encode())
    pieces = read(path, cut_kib=4)
    assert "".join(pieces) == PARAGRAPHS.replace("\r\n", "\n") and len(pieces) > 20
    assert all(re.search(r"\n\s*\n$", piece) and 4096 < len(piece.encode()) < 9000 for piece in pieces[:-1])
    assert read(path, cut_kib=0) == [PARAGRAPHS.replace("\r\n", "\n")]
    for block in blocks_of(path, cut_kib=4, block_bytes=BLOCK_BYTES):
        assert read(path, block.place, cut_kib=4) == pieces[block.first + block.count :]


def test_a_text_larger_than_what_is_read_at_once_is_cut_alike_from_every_place_on(tmp_path):
    text = PARAGRAPHS * (3 * CHUNK_BYTES // len(PARAGRAPHS))
    path = packed(tmp_path / "wiki.txt.zst", text.encode())
    blocks = list(blocks_of(path, cut_kib=64, block_bytes=500_000))
    pieces = [piece for block in blocks for piece in block.payload]
    assert "".join(pieces) == text.replace("\r\n", "\n") and len(blocks) > 4
    for block in blocks:
        assert read(path, block.place, cut_kib=64) == pieces[block.first + block.count :]


@pytest.mark.parametrize(("text", "end", "least"), [("word ü\n" * 9000, "\n", 8192), ("wörd " * 9000, " ", 16384), ("字" * 30000, "字", 32700)])
def test_text_without_paragraphs_is_cut_at_line_ends_then_spaces_then_anywhere(text, end, least, tmp_path):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    pieces = read(tmp_path / "one.txt", cut_kib=4)
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(piece.endswith(end) and least <= len(piece.encode()) <= least + 100 for piece in pieces[:-1])


def test_only_a_large_text_or_a_sources_only_one_is_cut(tmp_path):
    sizes = {2**16: (0, 0), 2**16 + 1: (0, 4), 2**20: (0, 8), 2**22: (0, 32), 2**22 + 1: (64, 64), 2**30: (64, 64)}
    for size, cuts in sizes.items():
        for name in ("a.txt", "a.jsonl"):
            with (tmp_path / name).open("wb") as file:
                file.truncate(size)
        assert (cut_of(tmp_path / "a.txt", False), cut_of(tmp_path / "a.txt", True)) == cuts
        assert (cut_of(tmp_path / "a.jsonl", False), cut_of(tmp_path / "a.jsonl", True)) == (0, 0)


# Ready-made tokens.

TOKENS = [np.arange(n % 17, dtype=np.int32) * 3 + n for n in range(200)]


def write_corpus(path: Path, documents: list, kind: str = "uint16", modes: bool = False) -> Path:
    """A .bin and .idx as Megatron-LM's IndexedDatasetBuilder writes them; every document of more than 4 tokens in two sequences."""
    code = {"uint8": 1, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}[kind]
    parts = [[ids] if len(ids) < 5 else [ids[:3], ids[3:]] for ids in documents]
    lengths = np.array([len(part) for document in parts for part in document], np.int32)
    begins = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))[:-1]]) * np.dtype(kind).itemsize
    boundaries = np.cumsum([0] + [len(document) for document in parts])
    path.write_bytes(b"".join(ids.astype(kind).tobytes() for ids in documents))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))
    index = lengths.tobytes() + begins.astype(np.int64).tobytes() + boundaries.astype(np.int64).tobytes()
    path.with_suffix(".idx").write_bytes(head + index + (bytes(len(lengths)) if modes else b""))
    return path


def same_tokens(found: list, expected: list) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(ids.dtype == np.int32 and np.array_equal(ids, other) for ids, other in pairs)


@pytest.mark.parametrize(("kind", "modes"), [("uint16", False), ("int32", True), ("int64", False)])
def test_a_token_corpus_gives_its_documents_from_every_place_on(kind, modes, tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", TOKENS, kind, modes)
    blocks = list(blocks_of(path, block_bytes=BLOCK_BYTES))
    assert len(blocks) > 3 and sum(block.num_bytes for block in blocks) == path.stat().st_size
    assert same_tokens(read(path), TOKENS) and not same_tokens(read(path), TOKENS[1:] + TOKENS[:1])
    for block in blocks:
        assert same_tokens(read(path, block.place), TOKENS[block.first + block.count :])
        assert same_tokens([ids for _, ids in records(pickle.loads(pickle.dumps(block)), [0])], TOKENS[block.first : block.first + 1])


def test_sequences_are_taken_from_where_the_index_says_that_they_begin(tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", [np.array([1, 2]), np.array([3, 4]), np.array([5])], "int32")
    begins = struct.pack("<3q", 0, 8, 16)
    assert same_tokens(read(path), [np.array(ids, np.int32) for ids in ([1, 2], [3, 4], [5])])
    path.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes().replace(begins, struct.pack("<3q", 12, 4, 0)))
    assert same_tokens(read(path, block_bytes=100), [np.array(ids, np.int32) for ids in ([4, 5], [2, 3], [1])])


@pytest.mark.parametrize("suffix", [".saved", ".parquet"])
def test_a_table_with_input_ids_gives_tokens_unless_another_column_is_wanted(suffix, tmp_path):
    table = pyarrow.table({"text": [str(n) for n in range(200)], "input_ids": [ids.tolist() for ids in TOKENS]})
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".saved":
        write_saved(path, table)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    blocks = list(blocks_of(path, block_bytes=BLOCK_BYTES))
    assert len(blocks) > 3 and {block.kind for block in blocks} == {"tokens"}
    assert same_tokens(read(path), TOKENS) and same_tokens(read(path, columns=lambda fields: []), TOKENS)
    assert all(same_tokens(read(path, block.place), TOKENS[block.first + block.count :]) for block in blocks)
    assert read(path, columns=lambda fields: ["text"]) == [{"text": str(n)} for n in range(200)]


# Which files.


def test_folders_give_all_known_files_below_them(tmp_path):
    for name in ("b.jsonl", "a/z.txt.gz", "a/.hidden/x.txt", ".x.txt", "picture.png", "README.md", "dataset_infos.json", "model.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    write(tmp_path / "c.saved", RECORDS), write_corpus(tmp_path / "d.bin", TOKENS)
    found = matching_files([str(tmp_path), str(tmp_path / "b.jsonl")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/z.txt.gz", "b.jsonl", "c.saved", "d.bin"]
    assert matching_files([str(tmp_path / "c*")]) == [tmp_path / "c.saved"] == matching_files([str(tmp_path / "c.saved")])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("the only text")
    assert matching_files([str(tmp_path / "docs")]) == [tmp_path / "docs" / "README.md"]


def test_a_pair_of_bin_and_idx_goes_by_any_of_its_names(tmp_path):
    path = write_corpus(tmp_path / "corpus_text_document.bin", TOKENS)
    names = [str(path), str(path.with_suffix(".idx")), str(path.with_suffix("")), str(tmp_path / "corpus*")]
    assert [matching_files([name]) for name in names] == [[path]] * 4 and matching_files(names) == [path]
    assert files_behind(path) == [path, path.with_suffix(".idx")] and stem_of(path) == "corpus_text_document"


def test_the_text_of_a_file_is_estimated_from_its_size(tmp_path, corpora):
    path = write_corpus(tmp_path / "corpus.bin", TOKENS)
    size = path.stat().st_size
    assert text_bytes(path) == (size, size // 2 * 4)
    size = corpora[".jsonl.gz"].stat().st_size
    assert text_bytes(corpora[".jsonl.gz"]) == (size, 3 * size) and text_bytes(corpora[".jsonl"])[0] == text_bytes(corpora[".jsonl"])[1]
    assert [stem_of(corpora[kind]) for kind in (".jsonl", ".jsonl.gz", ".saved")] == ["corpus", "corpus", "corpus.saved"]


# What cannot be read.


@pytest.mark.parametrize(("name", "reason"), [("nothing.txt", "which does not exist"), ("*.csv", "which matches no file"),
                                              ("a.docx", "the extension must be one of .jsonl, .ndjson, .json, .csv"),
                                              ("a.parquet.gz", "the extension must be one of"), ("empty", "a folder without a file that can be read"),
                                              ("splits", "splits of a saved dataset; it must name one: '"), ("spl*", "it must name one: '")])  # fmt: skip
def test_names_that_cannot_be_meant_are_refused(name, reason, tmp_path):
    (tmp_path / "a.docx").write_text("x"), (tmp_path / "a.parquet.gz").write_text("x"), (tmp_path / "empty").mkdir()
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    write_saved(tmp_path / "splits" / "train", pyarrow.Table.from_pylist(RECORDS))
    with pytest.raises(ValueError) as error:
        matching_files([str(tmp_path / name)])
    assert str(error.value).startswith("data.files names ") and reason in str(error.value)
    assert matching_files([str(tmp_path / "splits" / "*")]) == matching_files([str(tmp_path / "splits" / "**")])
    assert matching_files([str(tmp_path / "splits" / "*")]) == [tmp_path / "splits" / "train"]
    assert matching_files([str(tmp_path / "splits" / "train")]) == [tmp_path / "splits" / "train"]


CUT_OFF = {
    ".jsonl": "corpus.jsonl, document 60 is not whole", ".jsonl.gz": "corpus.jsonl.gz is cut off", ".jsonl.zst": "corpus.jsonl.zst is cut off",
    ".json": "corpus.json is cut off: it ends in the middle of document 60", ".objects.json": "corpus.objects.json is cut off: it ends in the",
    ".held.json": "corpus.held.json is cut off: it ends in the middle of document 1", ".json.zst": "corpus.json.zst is cut off",
    ".csv": "corpus.csv, document 60 is cut off", ".tsv.zst": "corpus.tsv.zst is cut off", ".parquet": "corpus.parquet cannot be read",
    ".arrow": "corpus.arrow cannot be read", ".stream.arrow": "corpus.stream.arrow cannot be read", ".feather": "corpus.feather cannot be read",
}  # fmt: skip


@pytest.mark.parametrize("kind", CUT_OFF)
def test_a_file_that_is_cut_off_is_refused(kind, corpora, tmp_path):
    data = corpora[kind].read_bytes()
    path = tmp_path / corpora[kind].name
    path.write_bytes(data)
    assert read(path) == RECORDS
    path.write_bytes(data[: -len(data) // 15 if kind == ".stream.arrow" else -20])
    assert refusal(path).startswith(f"data.files: {CUT_OFF[kind]}")


def test_an_array_or_a_stream_that_ends_between_two_documents_is_cut_off_all_the_same(tmp_path, corpora):
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}\n')
    assert refusal(tmp_path / "a.json") == "data.files: a.json is cut off: it ends after document 2, and its array has no end"
    (tmp_path / "a.arrow").write_bytes(corpora[".stream.arrow"].read_bytes()[:-8])
    assert refusal(tmp_path / "a.arrow") == "data.files: a.arrow is cut off: it ends after its batch 3, and Arrow's end mark is missing"


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.jsonl", '{"text": "x"}\n[1]\n', "a.jsonl, document 2 must be an object like"),
    ("a.jsonl", '{\n"text": "x"}\n', "a.jsonl, document 1 is not whole ({): a line must hold one JSON object"),
    ("a.jsonl", "[" * 100_000 + "]" * 100_000, "a.jsonl, document 1 cannot be read (RecursionError"),
    ("a.json", '[{"text": "x"}, {"text" "y"}, {"text": "z and more"}]', "a.json, document 2 is no JSON (Expecting ':' delimiter"),
    ("a.json", '[{"text": "x"} {"text": "y"}]', "a.json, document 2 is not set off by a comma"),
    ("a.json", '[{"text": "x"}] {"text": "y"}', "a.json goes on behind the end of its array, of which document 1 is the last"),
    ("a.json", '[{"text": "x"}, 7]', "a.json, document 2 must be an object like"),
    ("a.json", "[]", "a.json is empty: it holds no document"),
    ("a.jsonl", " \n\n", "a.jsonl is empty: it holds no document"),
    ("a.csv", "text,id\n", "a.csv is empty: it holds no document"),
    ("a.csv", "text,id\na,1\nb,2,3\n", "a.csv, document 2 has 3 cells, and the header line names 2 columns"),
    ("a.csv", 'text,id\n"a,1\nb,2\n', "a.csv, document 1 is cut off: the file ends inside a cell in quotes"),
    ("a.csv", 'text,id\na,1\n"b"c,2\n', "a.csv, document 2 is no row of a table (',' expected after '\"')"),
    ("a.csv", "text,text\na,1\n", "a.csv names the column 'text' twice"),
    ("a.csv", "text,id\na,1\nb", "a.csv, document 2 is cut off: it has 1 of 2 cells"),
    ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "a.jsonl is the pointer that Git LFS leaves"),
    ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid", "a.parquet is the pointer that Git LFS leaves"),
    ("a.bin", "xxxx", "a.bin has no a.idx beside it"),
])  # fmt: skip
def test_what_a_file_says_wrongly_is_named_with_its_document(name, content, reason, tmp_path):
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name).startswith(f"data.files: {reason}")


@pytest.mark.parametrize("kind", [*KINDS[:-1], ".txt", ".bin"])
def test_a_file_without_a_byte_is_empty(kind, tmp_path):
    (tmp_path / f"a{kind}").write_bytes(b"")
    assert refusal(tmp_path / f"a{kind}") == f"data.files: a{kind} is empty"


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".stream.arrow", ".feather", ".saved"])
def test_a_table_without_a_row_is_empty(kind, tmp_path):
    path = tmp_path / f"a{kind}"
    table = pyarrow.Table.from_pylist(RECORDS).slice(0, 0)
    if kind == ".saved":
        write_saved(path, table)
    elif kind == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_arrow(path, table)
    assert refusal(path) == f"data.files: a{kind} is empty: it holds no document"


@pytest.mark.parametrize(("name", "data", "reason"), [
    ("a.txt", "Wörter".encode("utf-16"), "a.txt is not UTF-8 (byte 0xff at 0); it begins like UTF-16: iconv -f UTF-16 -t UTF-8 a.txt"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "a.jsonl is not UTF-8 (byte 0xff at 0); it begins like UTF-16"),
    ("a.txt", "Wort ö".encode("latin-1"), "a.txt is not UTF-8 (byte 0xf6 at 5)"),
    ("a.json", '[{"text": "ö"}]'.encode("latin-1"), "a.json is not UTF-8 (byte 0xf6 at 11)"),
    ("a.csv", "text\nx\nö\n".encode("latin-1"), "a.csv, document 2 is not UTF-8 (byte 0xf6 at 7)"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xf6"}\n', "a.jsonl, document 2 is not UTF-8 (byte 0xf6 at 10 of its line)"),
    ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "a.jsonl is not UTF-8 (byte 0x8b at 1); it begins like a file packed by gzip"),
    ("a.jsonl.gz", b'{"text": "x"}', "a.jsonl.gz cannot be read (BadGzipFile"),
    ("a.jsonl.zst", b'{"text": "x"}', "a.jsonl.zst cannot be read (OSError"),
    ("a.txt", "Wort ö".encode()[:-1], "a.txt is not UTF-8 (byte 0xc3 at 5)"),
])  # fmt: skip
def test_what_is_not_utf_8_is_refused_with_its_byte(name, data, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).startswith(f"data.files: {reason}")


def test_bytes_in_a_table_that_are_no_utf_8_are_named_with_their_document(tmp_path):
    column = pyarrow.array([b"a", b"b", b"\xf6"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet"), write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": column}))
    for name in ("a.parquet", "a.arrow"):
        assert refusal(tmp_path / name) == f"data.files: {name}, document 3 is not UTF-8 in 'text' (byte 0xf6 at 0)"


def test_offsets_of_an_arrow_file_that_lie_outside_of_it_are_refused(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": ["one", "two", "three"]}))
    offsets = struct.pack("<4i", 0, 3, 6, 11)
    assert path.read_bytes().count(offsets) == 1 and len(read(path)) == 3
    path.write_bytes(path.read_bytes().replace(offsets, struct.pack("<4i", 0, 10**9, 6, 11)))
    assert refusal(path).startswith("data.files: a.arrow cannot be read (ArrowInvalid")


def damaged(path: Path, **changes) -> Path:
    index = bytearray(path.with_suffix(".idx").read_bytes())
    for offset, data in changes.values():
        index[offset : offset + len(data)] = data
    path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.mark.parametrize(("change", "reason"), [
    ((0, b"TNTIDX\x00\x00"), "corpus.idx is an index of an older form"),
    ((0, b"XX"), "corpus.idx is no index of a token corpus"),
    ((9, b"\x02"), "corpus.idx cannot be read: its version is 2"),
    ((17, b"\x07"), "corpus.idx cannot be read: its tokens are of type 7"),
    ((18, b"\xff\xff"), "corpus.idx is cut off"),
    ((34 + 4 * 3, struct.pack("<i", -1)), "corpus.idx, document 1 or one soon after is damaged: a sequence has less than no tokens"),
    ((-8, struct.pack("<q", 7)), "corpus.idx is damaged: its documents must reach from sequence 0"),
    ((-16, struct.pack("<q", 10**6)), "corpus.idx, document 1 or one soon after is damaged: the boundaries"),
])  # fmt: skip
def test_a_damaged_index_is_refused(change, reason, tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", TOKENS)
    offset = change[0] if change[0] >= 0 else path.with_suffix(".idx").stat().st_size + change[0]
    assert same_tokens(read(path), TOKENS)
    assert refusal(damaged(path, it=(offset, change[1]))).startswith(f"data.files: {reason}")


def test_a_corpus_whose_tokens_are_cut_off_or_not_there_is_refused(tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", TOKENS)
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(path).startswith("data.files: corpus.bin is cut off: it has")
    path.unlink()
    for name in ("corpus.idx", "corpus", "corpus*", ""):
        with pytest.raises(ValueError, match="^data.files: corpus.idx has no corpus.bin beside it, which holds its tokens$"):
            matching_files([str(tmp_path / name)])
    wide = write_corpus(tmp_path / "wide.bin", [np.array([2**31])], "int64")
    assert refusal(wide) == "data.files: wide.bin, document 1 or one soon after has a token id that does not fit in 32 bits"


def test_a_bin_without_an_index_is_refused_by_name_and_passed_over_in_a_folder(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"xxxx"), (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="^data.files: model.bin has no model.idx beside it"):
        matching_files([str(tmp_path / "model.bin")])
    assert matching_files([str(tmp_path)]) == [tmp_path / "a.txt"]


def test_blocks_are_values():
    block = Block("a", 0, 1, "texts", ["x"], {}, 1)
    with pytest.raises(AttributeError):
        block.count = 2
