"""Tables of numbers: which files are read, what is made of their columns, and what is said of those that are not."""

import math

import numpy
import pytest
import torch

from nfkernels.models import NSF
from nfkernels.nn import Flow, TableFlow
from nfkernels.training import DataError
from nfkernels.training.data.table import read_table
from nfkernels.training.tables.columns import load_table
from nfkernels.training.tables.kind import is_table

pytestmark = pytest.mark.usefixtures("elsewhere")

NAN = math.nan


def write(text, name="t.csv"):
    with open(name, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return name


def many(**columns):
    """A CSV file of columns, of which numbers are repeated."""
    length = max(len(values) for values in columns.values() if not isinstance(values, (int, float)))
    full = {name: [v] * length if isinstance(v, (int, float)) else list(v) for name, v in columns.items()}
    lines = [",".join(full), *(",".join(map(str, row)) for row in zip(*full.values(), strict=True))]
    return write("\n".join(lines) + "\n")


def normal(count=100, seed=0):
    return numpy.random.default_rng(seed).normal(size=count)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "values", "named"),
    [
        ("a,b\n1,2\n3,4\n", "a b", [[1, 2], [3, 4]], True),
        ("1,2\n3,4", "x1 x2", [[1, 2], [3, 4]], False),
        ("a;b\n1;2\n", "a b", [[1, 2]], True),
        ("a\tb\n1\t2\n", "a b", [[1, 2]], True),
        ("a|b\n1|2\n", "a b", [[1, 2]], True),
        ("  1 2   3\n4 5 6\n", "x1 x2 x3", [[1, 2, 3], [4, 5, 6]], False),
        ("# a b\n1 2\n", "a b", [[1, 2]], True),
        ('"a, b", c\r\n "1", 2\r\n', "a,_b c", [[1, 2]], True),
        ("\ufeffa,b\n1e3,-.5\n", "a b", [[1000, -0.5]], True),
        (",a\n0,5\n1,6\n", "column1 a", [[0, 5], [1, 6]], True),
        ("a\n\n1\n\n2\n", "a", [[1], [2]], True),
        ("a,b\n1,NA\n?,2\n,nan\nNone,null\n", "a b", [[1, NAN], [NAN, 2], [NAN, NAN], [NAN, NAN]], True),
        ("1,2\nNaN,3\n", "x1 x2", [[1, 2], [NAN, 3]], False),
        ("a,b\n1,inf\n", "a b", [[1, math.inf]], True),
    ],
)
def test_csv_of_many_kinds(text, names, values, named):
    table = read_table(write(text))
    assert [name.replace(" ", "_") for name in table.names] == names.split()
    numpy.testing.assert_array_equal(table.values, values)
    assert table.named is named


def test_a_header_can_be_told():
    path = write("1,2\n3,4\n")
    assert read_table(path, header=True).names == ("1", "2")
    assert read_table(path, header=True).values.tolist() == [[3, 4]]
    with pytest.raises(DataError, match="column 'x1' has 'a' in line 1"):
        read_table(write("a\n1\n"), header=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "t.csv is empty"),
        ("\n\n", "t.csv is empty"),
        ("a,b\n", "t.csv has no rows of numbers"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells and its header 2"),
        ("1,2\n\n3\n", "line 3 has 1 cell and its first line 2"),
        ("a,b,a\n1,2,3\n", "columns 1 and 3 are both called 'a': rename one of them"),
        ("a,b,c\n1,2,3\n2,x,3\n", "'b' has 'x' in line 3, and a flow needs numbers: leave it out with --columns a,c"),
        ("a\nx\n", "there is no other column"),
        ("a;b\n1;2\n1,5;2\n", "'1,5' in line 3, a decimal comma: write a point"),
        ("a,b\n1_0,2\n", "column 'a' has '1_0' in line 2"),
    ],
)  # fmt: skip
def test_csv_mistakes_are_one_sentence(text, sentence):
    with pytest.raises(DataError) as raised:
        read_table(write(text))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_columns_that_are_not_asked_for_may_hold_anything():
    path = write("name,b,c\nx,1,2\ny,3,4\n")
    table = read_table(path, columns=["c", "b"])
    assert (table.names, table.values.tolist()) == (("c", "b"), [[2, 1], [4, 3]])
    with pytest.raises(DataError, match="has no column 'q': its columns are name, b, c"):
        read_table(path, columns=["q"])


def test_other_files(monkeypatch):
    numpy.save("a.npy", numpy.arange(6, dtype=numpy.int16).reshape(3, 2))
    table = read_table("a.npy", columns=["x2"])
    assert (table.names, table.values.tolist()) == (("x2",), [[1], [3], [5]])
    records = numpy.array([(1, 2.5), (3, 4.5)], dtype=[("n", "i4"), ("v", "f8")])
    numpy.save("r.npy", records)
    assert read_table("r.npy").names == ("n", "v")
    assert read_table("r.npy").values.tolist() == [[1, 2.5], [3, 4.5]]
    numpy.save("o.npy", numpy.array([{}, print], dtype=object), allow_pickle=True)
    numpy.save("cube.npy", numpy.zeros((2, 2, 2)))
    write("not numpy", "b.npy")
    for name, sentence in (
        ("o.npy", "without loading python objects"),
        ("b.npy", "cannot be read as an array"),
        ("cube.npy", r"float64 \[2, 2, 2\]: expected numbers \[N, D\]"),
        ("nowhere.csv", "nowhere.csv does not exist: expected a table"),
        (".", "is a folder: expected a table"),
        (write("x", "t.xlsx"), "t.xlsx is not a kind of file that is known: expected a table"),
    ):
        with pytest.raises(DataError, match=sentence):
            read_table(name)
    with pytest.raises(DataError, match="--header and --no-header are for CSV"):
        read_table("a.npy", header=True)
    with open("latin.csv", "wb") as file:
        file.write("größe\n1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv is no text in UTF-8"):
        read_table("latin.csv")


def test_no_pickle_is_ever_run():
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    numpy.save("bomb.npy", numpy.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="without loading python objects"):
        read_table("bomb.npy")
    assert not is_table("bomb.npy")


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"a": [1, 2, None], "b": [True, False, True], "s": ["x", "y", "z"], "t": [[1], [2], [3]]}
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    table = read_table("t.parquet", columns=["b", "a"])
    numpy.testing.assert_array_equal(table.values, [[1, 1], [0, 2], [1, NAN]])
    with pytest.raises(DataError, match=r"column 's' is string; column 't' is list.*leave it out with --columns a,b"):
        read_table("t.parquet")
    write("PAR1 no", "broken.parquet")
    with pytest.raises(DataError, match="cannot be read as a Parquet file"):
        read_table("broken.parquet")
    assert is_table("t.parquet")
    parquet.write_table(pyarrow.table({"image": [b"1"], "label": [1]}), "pictures.parquet")
    assert not is_table("pictures.parquet")


def test_a_missing_pyarrow_is_told(monkeypatch):
    import sys

    write("", "t.parquet")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r'needs pyarrow, which is missing: pip install "nfkernels\[stream\]"'):
        read_table("t.parquet")


def test_what_is_taken_for_a_table():
    numpy.save("images.npy", numpy.zeros((4, 8, 8), numpy.uint8))
    numpy.save("rows.npy", numpy.zeros((4, 8), numpy.float32))
    assert is_table("rows.npy")
    assert is_table("new.csv")  # that it is not there is told by the reader of tables
    assert is_table("digits", "nsf")
    assert not is_table("rows.npy", "glow")
    for source in (None, "digits", "images.npy", "."):
        assert not is_table(source)


# --- columns ----------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_seeded_and_standardised():
    x = normal(200) * 5 + 3
    path = many(x=x)
    table = load_table(path)
    assert [len(part) for part in (table.train, table.validation, table.test)] == [160, 20, 20]
    rows = torch.cat([table.train.index, table.validation.index, table.test.index])
    assert sorted(rows.tolist()) == list(range(200))
    for part in (table.train, table.test):
        torch.testing.assert_close(part.values[:, 0], torch.tensor(x[part.index]).float())
    assert torch.equal(load_table(path).test.index, table.test.index)
    assert not torch.equal(load_table(path, seed=1).test.index, table.test.index)
    (column,) = table.columns
    own = table.train.values.double()
    assert column.shift == pytest.approx(float(own.mean()), rel=1e-6)
    assert column.scale == pytest.approx(float(own.std(correction=0)), rel=1e-6)


def test_kinds_of_columns_are_told():
    x = normal(100)
    table = load_table(
        many(x=x, year=2020, age=range(20, 120), pay=[100 * (n % 7) + 50 for n in range(100)], given=normal(100, 1)),
        context=["given"],
    )
    kinds = {column.name: (column.kind, column.step, column.context) for column in table.columns}
    assert kinds == {
        "x": ("real", None, False),
        "year": ("constant", None, False),
        "age": ("integer", 1, False),
        "pay": ("integer", 100, False),
        "given": ("real", None, True),
    }
    told = "\n".join(table.notes)
    assert "constant, so not modelled but put back into samples: year = 2020" in told
    assert "whole numbers, trained on with uniform noise and rounded in samples: age, pay (in steps of 100)" in told
    assert "age counts the rows" in told
    assert table.train.values.shape == (80, 3)
    assert table.train.context.shape == (80, 1)
    pay = next(column for column in table.columns if column.name == "pay")
    assert pay.origin == 50
    # The noise has a variance, too.
    values = table.train.values[:, 2].double()
    assert pay.scale == pytest.approx(math.sqrt(float(values.var(correction=0)) + 100**2 / 12), rel=1e-6)


def test_what_a_density_makes_too_little_sense_for_is_told():
    x = normal(100)
    peak = numpy.where(numpy.arange(100) % 4 == 0, 0.5, normal(100, 1))
    table = load_table(many(x=x, y=2 * x + 1, peak=peak))
    assert any("x, y determine each other exactly" in note for note in table.notes)
    assert any(note.startswith("25 of 100 rows have peak = 0.5") for note in table.notes)
    assert load_table(many(x=x, y=normal(100, 2))).notes == ()


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        ({"a": [*normal(98), "NA", ""], "b": [*normal(99), "?"]}, {}, "2 of 100 rows lack a value (a: 2, b: 1): give "),
        ({"a": [1.5, math.inf, -math.inf, *normal(50)]}, {}, "column 'a' has 2 infinite values, the first in row 2"),
        ({"a": normal(9)}, {}, "has 9 rows to use: at least 10 are needed"),
        ({"a": 3, "b": [1] * 20}, {}, "every column is constant, which leaves nothing to model"),
        ({"a": normal()}, {"context": ["a"]}, "every column is constant or context"),
        ({"a": normal(), "b": normal()}, {"context": ["c"]}, "--context c: t.csv has no such column; its columns"),
        ({"a": normal(), "b": normal()}, {"columns": ["c"]}, "t.csv has no column 'c'"),
        ({"a": normal() * 1e33}, {}, "column 'a' has values up to"),
        ({"a": normal() * 1e-33}, {}, "values that hardly differ"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_modelled(columns, options, sentence):
    with pytest.raises(DataError) as raised:
        load_table(many(**columns), **options)
    assert sentence in str(raised.value)


def test_missing_rows_can_be_dropped():
    path = many(a=[*normal(98), "NA", ""], b=[*normal(99, 1), "?"])
    table = load_table(path, missing="drop")
    assert table.notes == ("2 of 100 rows lack a value and were left out (a: 2, b: 1)",)
    index = torch.cat([table.train.index, table.validation.index, table.test.index])
    assert sorted(index.tolist()) == list(range(98))
    assert load_table(many(a=["NA", *normal(50)]), missing="drop").train.index.min() >= 1


def test_numbers_far_from_zero_stay_in_double_precision():
    far = load_table(many(t=1.7e9 + normal(), x=normal(100, 1)))
    assert far.train.values.dtype == torch.float64
    assert load_table(many(x=normal())).train.values.dtype == torch.float32


@pytest.mark.parametrize("far", [2460000.53, 1e9 + 20])
def test_far_columns_are_standardised_to_the_middle(far, tmp_path):
    t, c = ([repr(float(far + 0.1 * v)) for v in normal(seed=seed)] for seed in (0, 1))
    table = load_table(many(t=t, c=c), context=["c"])
    columns = [column.facts() for column in table.columns]
    flow = TableFlow(NSF(1, layers=1, hidden=4, context=1), columns)
    flow.save(tmp_path / "flow.safetensors")
    for one in (flow, Flow.load(tmp_path / "flow.safetensors")):
        z = one.bijection[0](table.train.values)[0]
        back = one.bijection[0].inverse(z)[0]
        given = one.embed(table.train.context)
        assert z.mean().abs() < 1e-3
        assert abs(z.std() - 1) < 0.02
        assert given.mean().abs() < 1e-3
        torch.testing.assert_close(back, table.train.values, rtol=0, atol=1e-6)


def test_a_period_that_whole_numbers_do_not_have_is_refused():
    path = many(hour=[at % 24 for at in range(96)], x=normal(96))
    for given, period in (("hour", "6.28319"), ("hour=1", "1"), ("hour=5.5", "5.5")):
        with pytest.raises(DataError, match=rf"no whole turn of them is {period}: give the period, such as hour=24"):
            load_table(path, circular=[given])
    assert load_table(path, circular=["hour=12"]).columns[0].period == 12
    odd = write("a=1,b\n" + "".join(f"{v},{v * v}\n" for v in normal()))
    assert load_table(odd, circular=["a=1"]).columns[0].period == pytest.approx(2 * math.pi)
    assert load_table(odd, circular=["a=1=3"]).columns[0].period == 3


def test_rows_that_are_left_are_told_among_how_many():
    with pytest.raises(DataError, match=r"has 3 rows of 30 to use: at least 10"):
        load_table(many(a=[1, 2, 3, *[""] * 27], b=normal(30)), missing="drop")


def test_one_axis_of_numbers_is_no_set_of_images():
    numpy.save("line.npy", normal())
    assert is_table("line.npy")
    with pytest.raises(DataError, match=r"float64 \[100\]: expected numbers \[N, D\]"):
        read_table("line.npy")


def test_values_far_from_all_others_are_told():
    values = [*normal(), -99999.0]
    table = load_table(many(a=values, b=[*normal(seed=1), 0.5]))
    assert [note.partition(":")[0] for note in table.notes] == [
        "a has 1 value that all others lie far from, such as -99999"
    ]
    assert not load_table(many(a=list(numpy.exp(2 * normal(2000))), b=normal(2000, 1))).notes
    assert not load_table(many(a=[*[0.0] * 4, *normal(96)], b=normal(seed=1))).notes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# made today\n# again\na,b\n1,2\n3,4\n", r"line 3 has 2 cells and its header 1: of lines that start with #"),
        ("a\n0,5\n-,7\n", r"line 2 has 2 cells and its header 1: where the comma is that of a decimal number"),
        ("a,b\n1,2,3\n", r"line 2 has 3 cells and its header 2$"),
    ],
)
def test_uneven_lines_are_told_why(text, sentence):
    with pytest.raises(DataError, match=sentence):
        read_table(write(text))


def test_numbers_too_large_to_be_whole_are_told():
    table = load_table(many(id=[10**17 + 1000 * at for at in range(50)], x=normal(50)))
    assert table.columns[0].kind == "real"
    assert table.notes == ("id has numbers so large that float64 does not tell whole ones apart: it is taken for real",)
