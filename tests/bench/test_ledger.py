"""The ledger: rows that are whole, sealed and alone."""

import json
import multiprocessing
import resource
import signal

import pytest

from testtime.bench.ledger import Ledger, digest, opened, seal, write


def made(method="tent", error=0.25, **changes):
    row = {
        "key": digest([method, changes]),
        "spec": {
            **{"method": method, "shifts": ["fog:5"], "protocol": "online", "batch_size": 64},
            **{"seed": 0, "order": "natural", "window": 0},
        },
        "model": {"name": "net", "sha256": "1"},
        "data": {"name": "digits", "sha256": "2", "count": 9},
        "method": {"name": method},
        "versions": {"code": "c"},
        "results": {"error": error},
        "status": "done",
        "measured": {"seconds": 1.0},
    }
    return row | changes


def test_rows_come_back_sealed(tmp_path):
    path = tmp_path / "rows.jsonl"
    with opened(path) as ledger:
        ledger.append(made())
        ledger.append(made("bn"))
    read = Ledger.read(path)
    assert [row["method"]["name"] for row in read] == ["tent", "bn"]
    assert read.rows[0] == seal(made())
    assert not read.check()


def test_a_torn_last_line_is_left_out_and_repaired_when_opened(tmp_path):
    path = tmp_path / "rows.jsonl"
    with opened(path) as ledger:
        ledger.append(made())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    with pytest.warns(UserWarning, match="last line of .* was cut off and is left out"):
        assert len(Ledger.read(path)) == 1
    assert path.read_bytes() != whole
    with pytest.warns(UserWarning, match="It was taken out of the file"), opened(path) as ledger:
        ledger.append(made("bn"))
    assert len(Ledger.read(path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.25", "0.05"), "line 2 was changed after it was written"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "line 1 has format 9, this"),
        (lambda text: "nonsense\n" + text, "line 1 is no row of a ledger: 'nonsense'"),
        (lambda text: "3\n" + text, "line 1 is no row"),
    ],
)
def test_what_is_no_row_is_refused_and_named(tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    with opened(path) as ledger:
        ledger.append(made("bn", error=0.5))
        ledger.append(made())
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Ledger.read(path)


def test_two_benches_cannot_write_to_one_ledger(tmp_path):
    path = tmp_path / "rows.jsonl"
    with opened(path):
        process = multiprocessing.get_context("spawn").Process(target=_intrude, args=(path,))
        process.start()
        process.join()
    assert process.exitcode == 0


def _intrude(path):
    with pytest.raises(OSError, match="Another process is writing to"), opened(path):
        pass


def test_a_place_that_cannot_be_written_to(tmp_path):
    with pytest.raises(OSError, match="No rows can be written"), opened(tmp_path / "a" / "b"):
        pass
    with pytest.raises(OSError, match="it is no regular file"), opened(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="There is no ledger"):
        Ledger.read(tmp_path / "none")


def test_a_full_disk_leaves_the_rows_that_were_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    with opened(path) as ledger:
        ledger.append(made())
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
        try:
            with pytest.raises(OSError, match="What was there before is unchanged"):
                ledger.append(made("bn"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert len(ledger) == 1
    assert path.read_bytes() == before


def test_merging_keeps_one_of_equal_rows_and_refuses_contradictions():
    one, other = Ledger([seal(made())]), Ledger([seal(made()), seal(made("bn"))])
    assert len(one.merge(other)) == 2
    failed = seal(made(status="failed", error="x", key=digest(["tent", {}])))
    assert Ledger([failed]).merge(one).rows == one.rows
    assert one.merge(Ledger([failed])).rows == one.rows
    changed = Ledger([seal(made(error=0.5))])
    with pytest.raises(ValueError, match=r"came out differently: tent on net.*0\.2500 and 0\.5000"):
        one.merge(changed)


def test_what_makes_rows_doubtful():
    rows = [made(), made(), made("bn", versions={"code": "d"}), made("sar", status="failed")]
    rows[3]["error"] = "ValueError: no"
    said = " ".join(Ledger([seal(row) for row in rows]).check())
    assert "Row 2 repeats row 1: tent on net" in said
    assert "2 states of the code" in said
    assert "Row 4 failed" in said


def test_exports(tmp_path):
    ledger = Ledger([seal(made()), seal(made("bn"))])
    lines = ledger.csv().splitlines()
    assert len(lines) == 3
    assert "results.error" in lines[0]
    parquet = pytest.importorskip("pyarrow.parquet")
    ledger.parquet(tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table["results.error"].to_pylist() == [0.25, 0.25]
    write(ledger.rows, tmp_path / "copy.jsonl")
    assert Ledger.read(tmp_path / "copy.jsonl").rows == ledger.rows
    with pytest.raises(FileExistsError, match="is there already"):
        write(ledger.rows, tmp_path / "copy.jsonl")
    assert (
        json.loads(lines and (tmp_path / "copy.jsonl").read_text().splitlines()[0])["format"] == 1
    )
