"""GLUE's file formats, and which files are refused."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lola_glue.readers import TsvFormat, read_tsv
from lola_glue.tasks import TASKS, TaskError, load_task
from tests.glue.refusals import refused

# Two rows of each task as its files have them: made-up sentences, GLUE's own layout.
STS_B_HEADER = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
    "sentence1\tsentence2\tscore"
)
MNLI_START = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
    "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
)
MNLI_ROW = "1\t2\t3\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)"
FILES = {
    "cola": "gj04\t1\t\tHe sings.\nks08\t0\t*\tSings he the.\n",
    "sst-2": "sentence\tlabel\na warm film \t1\ndull \t0\n",
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        '1\t10\t20\tHe said " yes .\t" Yes , " he said .\n'
        "0\t11\t21\tStocks fell .\tIt rained .\n"
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tWhat for?\t1\n4\t5\t6\tWho?\tWhen?\t0\n"
    ),
    "sts-b": (
        f"{STS_B_HEADER}\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA plane.\tA jet.\t5.000\n"
        "1\tnews\tf\t2012\t2\tnone\tnone\tA man.\tA cat.\t0.25\n"
    ),
    "mnli": (
        f"{MNLI_START}\tlabel1\tgold_label\n"
        f"{MNLI_ROW}\tIt rains.\tIt is wet.\tneutral\tentailment\n"
        f"{MNLI_ROW}\tIt rains.\tIt is dry.\tneutral\tcontradiction\n"
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n"
        "0\tWho came?\tAnn came.\tentailment\n1\tWho?\tIt rains.\tnot_entailment\n"
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tAnn came.\tSomeone came.\tentailment\n"
        "1\tIt rains.\tSomeone came.\tnot_entailment\n"
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tIt fell.\tA fell.\t1\n1\tB.\tC.\t0\n"
    ),
}
EXPECTED = {
    "cola": ([("He sings.", None), ("Sings he the.", None)], [1, 0]),
    "sst-2": ([("a warm film ", None), ("dull ", None)], [1, 0]),
    "mrpc": (
        [('He said " yes .', '" Yes , " he said .'), ("Stocks fell .", "It rained .")],
        [1, 0],
    ),
    "qqp": ([("Why?", "What for?"), ("Who?", "When?")], [1, 0]),
    "sts-b": ([("A plane.", "A jet."), ("A man.", "A cat.")], [5.0, 0.25]),
    # The hub's numbers: entailment 0, neutral 1, contradiction 2.
    "mnli": ([("It rains.", "It is wet."), ("It rains.", "It is dry.")], [0, 2]),
    "qnli": ([("Who came?", "Ann came."), ("Who?", "It rains.")], [0, 1]),
    "rte": ([("Ann came.", "Someone came."), ("It rains.", "Someone came.")], [0, 1]),
    "wnli": ([("It fell.", "A fell."), ("B.", "C.")], [1, 0]),
}
GLUE_TASKS = tuple(FILES)
# How pandas puts quotes: by default where they are needed.
QUOTINGS = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)


def write_task(data_dir: Path, name: str, train: str, dev: str | None = None) -> Path:
    """Write a task's two files as bytes, so that line ends stay as given."""
    source = TASKS[name].source
    assert source is not None
    folder = data_dir / source.folder
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_bytes(train.encode())
    dev_name = f"dev{source.dev_suffix}.tsv"
    (folder / dev_name).write_bytes((train if dev is None else dev).encode())
    return folder


class TestDirectory:
    @pytest.mark.parametrize("name", GLUE_TASKS)
    @pytest.mark.parametrize("line_end", ["\n", "\r\n"])
    def test_reads_each_format(self, tmp_path, name, line_end):
        write_task(tmp_path, name, FILES[name].replace("\n", line_end))
        task, train, dev = load_task(name, tmp_path)
        sentences, labels = EXPECTED[name]
        for split in (train, dev):
            assert list(split.sentences) == sentences
            assert split.labels.tolist() == labels
            assert split.labels.dtype == (np.float64 if name == "sts-b" else np.int64)
            assert all((second is not None) == task.is_pair for _, second in sentences)

    def test_train_and_dev_are_not_swapped(self, tmp_path):
        write_task(tmp_path, "cola", "a\t1\t\tTrain.\n", "a\t0\t\tDev.\n")
        _, train, dev = load_task("CoLA", str(tmp_path))
        assert train.sentences == (("Train.", None),)
        assert dev.sentences == (("Dev.", None),)

    def test_columns_are_found_by_name(self, tmp_path):
        write_task(
            tmp_path, "rte", "label\tsentence2\tx\tsentence1\nentailment\tb\t\ta"
        )
        _, train, _ = load_task("rte", tmp_path)
        assert train.sentences == (("a", "b"),)

    def test_mnli_dev_with_five_annotators(self, tmp_path):
        header = "\t".join(f"label{i}" for i in range(1, 6))
        dev = f"{MNLI_START}\t{header}\tgold_label\n" + "\t".join(
            [MNLI_ROW, "A.", "B.", *["neutral"] * 5, "contradiction\n"]
        )
        write_task(tmp_path, "mnli", FILES["mnli"], dev)
        assert load_task("mnli", tmp_path)[2].labels.tolist() == [2]

    def test_folder_in_another_case(self, tmp_path):
        write_task(tmp_path, "cola", FILES["cola"]).rename(tmp_path / "cola")
        assert len(load_task("cola", tmp_path)[1]) == 2

    def test_line_breaks_of_unicode_stay_inside_the_sentence(self, tmp_path):
        sentence = "one\x85two\u2028three\x0bfour\x0cfive\x1csix"
        write_task(tmp_path, "cola", f"a\t1\t\t{sentence}\nb\t0\t\tnext\n")
        assert load_task("cola", tmp_path)[1].sentences[0] == (sentence, None)

    def test_missing_last_line_end_and_blank_lines(self, tmp_path):
        write_task(tmp_path, "cola", "a\t1\t\tFirst.\n\n\r\nb\t0\t\tLast.")
        assert len(load_task("cola", tmp_path)[1]) == 2

    def test_qqp_leaves_out_its_few_malformed_rows(self, tmp_path, caplog):
        # The official train.tsv has rows broken over two lines.
        write_task(tmp_path, "qqp", f"{FILES['qqp']}7\t8\t9\tBroken\n\t?\t0\n")
        _, train, _ = load_task("qqp", tmp_path)
        assert len(train) == 2
        assert "malformed lines [4, 5]" in caplog.text

    def test_qqp_with_many_malformed_rows_is_refused(self, tmp_path):
        write_task(tmp_path, "qqp", FILES["qqp"] + "7\t8\n" * 11)
        refused("qqp", tmp_path, match="line 14: expected 6 tab-separated fields")


class TestCsv:
    """Files that a CSV writer made of GLUE's."""

    SENTENCE = 'She said "no", twice.'

    @pytest.mark.parametrize("name", GLUE_TASKS)
    @pytest.mark.parametrize("quoting", QUOTINGS)
    def test_a_table_that_pandas_wrote(self, tmp_path, name, quoting, caplog):
        layout = TASKS[name].source.layout
        raw = pandas.read_csv(
            io.StringIO(FILES[name].removeprefix("\ufeff"), newline=""),
            sep="\t",
            quoting=csv.QUOTE_NONE,
            header=None if layout.header else 0,
            keep_default_na=False,
            # Labels as they are written.
            dtype=str if name == "sts-b" else None,
        )
        column = layout.header.index("sentence") if layout.header else layout.columns[0]
        raw.loc[len(raw)] = raw.loc[0]
        raw.loc[len(raw) - 1, column] = self.SENTENCE
        text = raw.to_csv(
            sep="\t", index=False, quoting=quoting, header=not layout.header
        )
        assert '""no""' in text
        write_task(tmp_path, name, text)
        with caplog.at_level("INFO"):
            _, train, _ = load_task(name, tmp_path)
        sentences, labels = EXPECTED[name]
        expected = [*sentences, (self.SENTENCE, sentences[0][1])]
        assert list(train.sentences) == expected
        assert train.labels.tolist() == [*labels, labels[0]]
        assert "train.tsv: read as CSV, without the quotes" in caplog.text

    def test_sentences_over_several_lines(self, tmp_path):
        sentences = ['"Well"\tsaid he.', "one\ntwo"]
        table = pandas.DataFrame({"sentence": sentences, "label": 1})
        table.loc[len(table)] = [self.SENTENCE, 0]
        write_task(tmp_path, "sst-2", table.to_csv(sep="\t", index=False))
        _, train, _ = load_task("sst-2", tmp_path)
        assert [first for first, _ in train.sentences] == [*sentences, self.SENTENCE]

    def test_a_mixed_file_is_read_as_it_stands_with_one_warning(self, tmp_path, caplog):
        """As where rows of a CSV writer's were added to GLUE's own."""
        text = FILES["mrpc"] + '1\t1\t2\t"She said ""no""."\tB\n' * 2
        write_task(tmp_path, "mrpc", text, FILES["mrpc"])
        _, train, _ = load_task("mrpc", tmp_path)
        assert train.sentences[2] == ('"She said ""no""."', "B")
        (warning,) = [line for line in caplog.messages if "quotes" in line]
        assert f"{Path('MRPC', 'train.tsv')}, line 4: a field has doubled" in warning

    def test_quotes_of_glues_own_are_no_csv(self, tmp_path, caplog):
        write_task(
            tmp_path,
            "sst-2",
            'sentence\tlabel\n"a warm film"\t1\n" dull "\t0\n""odd"" one\t0\n',
        )
        _, train, _ = load_task("sst-2", tmp_path)
        assert [s for s, _ in train.sentences] == [
            '"a warm film"',
            '" dull "',
            '""odd"" one',
        ]
        assert not caplog.messages


class TestRefusals:
    def test_no_data_dir_names_the_options(self):
        refused("cola", match=r'data-dir="hub".*task="acceptability"')

    @pytest.mark.parametrize("data_dir", [None, ""])
    def test_acceptability_needs_no_data_dir(self, data_dir):
        assert len(load_task("acceptability", data_dir, num_train=4, num_dev=2)[2]) == 2

    def test_missing_directory(self, tmp_path):
        refused("cola", tmp_path / "none", match="none' is not a directory")

    def test_missing_task_folder(self, tmp_path):
        refused("cola", tmp_path, match="holds no CoLA")

    def test_missing_file(self, tmp_path):
        folder = write_task(tmp_path, "cola", FILES["cola"])
        (folder / "dev.tsv").unlink()
        refused("cola", tmp_path, match=r"dev\.tsv \(No such file")

    def test_directory_in_the_place_of_a_file(self, tmp_path):
        folder = write_task(tmp_path, "cola", FILES["cola"])
        (folder / "dev.tsv").unlink()
        (folder / "dev.tsv").mkdir()
        refused("cola", tmp_path, match=r"dev\.tsv \(Is a directory")

    @pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
    def test_empty_file(self, tmp_path, content):
        write_task(tmp_path, "cola", content)
        refused("cola", tmp_path, match=r"Empty file: .*train\.tsv")

    def test_file_without_any_line_where_a_header_belongs(self, tmp_path):
        write_task(tmp_path, "rte", "")
        refused("rte", tmp_path, match=r"Empty file: .*train\.tsv")

    def test_header_without_rows(self, tmp_path):
        write_task(tmp_path, "sst-2", "sentence\tlabel\n")
        refused("sst-2", tmp_path, match=r"Empty file: .*train\.tsv")

    def test_missing_column(self, tmp_path):
        write_task(tmp_path, "sst-2", "text\tlabel\nfine\t1\n")
        refused("sst-2", tmp_path, match="line 1: expected 'sentence'.*found 'text'")

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("a\t1\tNo note.", r"expected 4 .*found 3"),
            ("a\t1\t\tTab\tinside.", r"expected 4 .*found 5"),
            ("a\t1\t\t ", "expected a sentence in 'sentence', found nothing"),
        ],
    )
    def test_malformed_row_names_file_and_line(self, tmp_path, row, problem):
        write_task(tmp_path, "cola", f"{FILES['cola']}\n{row}\n")
        # Two good lines and a blank one precede it.
        refused("cola", tmp_path, match=rf"train\.tsv, line 4: {problem}")

    @pytest.mark.parametrize(
        ("name", "row", "expected"),
        [
            ("cola", "a\t2\t\tWords.", "0 or 1, found '2'"),
            ("cola", "a\t\t\tWords.", "0 or 1, found ''"),
            ("rte", "9\ta\tb\t1", "entailment or not_entailment, found '1'"),
            *(
                (
                    "sts-b",
                    f"9\tg\tf\ty\t1\ts\ts\ta\tb\t{value}",
                    f"a number from 0 to 5, found '{value}'",
                )
                for value in ("5.1", "-1", "nan", "high")
            ),
        ],
    )
    def test_bad_label(self, tmp_path, name, row, expected):
        write_task(tmp_path, name, f"{FILES[name]}{row}\n")
        line = FILES[name].count("\n") + 1
        refused(name, tmp_path, match=f"line {line}: expected {expected}")

    def test_not_utf8(self, tmp_path):
        folder = write_task(tmp_path, "cola", FILES["cola"])
        (folder / "train.tsv").write_bytes(b"a\t1\t\tcaf\xe9\n")
        refused("cola", tmp_path, match="not UTF-8: .*byte 0xe9")

    def test_field_beyond_the_csv_limit(self, tmp_path):
        long = "x" * (csv.field_size_limit() + 1)
        write_task(tmp_path, "cola", f"{FILES['cola']}a\t1\t\t{long}\n")
        refused("cola", tmp_path, match="line 3: field larger than field limit")


@pytest.fixture(scope="module")
def scratch_file(tmp_path_factory):
    return tmp_path_factory.mktemp("tsv") / "train.tsv"


class TestParserProperties:
    @pytest.mark.parametrize("name", ["cola", "mrpc", "sts-b"])
    @given(data=st.data())
    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_any_bytes_give_examples_or_a_task_error(self, scratch_file, name, data):
        source = TASKS[name].source
        assert source is not None
        start = FILES[name].encode() if data.draw(st.booleans()) else b""
        piece = st.one_of(
            st.binary(max_size=20),
            st.sampled_from([b"\t", b"\n", b"\r", b'"', b"\x00", b"1", b"a\t1\t\tb\n"]),
        )
        scratch_file.write_bytes(start + b"".join(data.draw(st.lists(piece))))
        try:
            examples = read_tsv(scratch_file, source.layout)
        except TaskError as error:
            message = str(error)
            assert str(scratch_file) in message
            assert "\n" not in message and "\r" not in message
        else:
            assert len(examples) > 0
            assert all(first.strip() for first, _ in examples.sentences)

    @given(
        sentences=st.lists(
            st.text(
                st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]),
                min_size=1,
            ).filter(str.strip),
            min_size=1,
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_any_sentence_without_tab_or_line_end_comes_back(
        self, scratch_file, sentences
    ):
        # By a quote of its own the file cannot be taken for a CSV writer's.
        sentences = [*sentences, 'a "quote']
        lines = ["sentence\tlabel", *(f"{sentence}\t1" for sentence in sentences)]
        scratch_file.write_bytes("\n".join(lines).encode())
        examples = read_tsv(scratch_file, TsvFormat(("sentence", "label")))
        assert [first for first, _ in examples.sentences] == sentences

    @given(
        sentences=st.lists(
            st.text(
                st.one_of(
                    st.sampled_from("\"' ,"),
                    st.characters(
                        exclude_characters="\t\n\r", exclude_categories=["Cs"]
                    ),
                ),
                min_size=1,
            ).filter(str.strip),
            min_size=1,
        ),
        quoting=st.sampled_from(QUOTINGS),
    )
    @settings(max_examples=60, deadline=None)
    def test_what_pandas_writes_comes_back(self, scratch_file, sentences, quoting):
        sentences = [*sentences, 'a "quote"']
        table = pandas.DataFrame({"sentence": sentences, "label": 1})
        table.to_csv(scratch_file, sep="\t", index=False, quoting=quoting)
        examples = read_tsv(scratch_file, TsvFormat(("sentence", "label")))
        assert [first for first, _ in examples.sentences] == sentences
