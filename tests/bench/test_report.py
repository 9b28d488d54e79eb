"""The report: right numbers, one file without a network, and it works in a real browser."""

import re
import shutil
import subprocess

import pytest

from testtime.bench import Ledger
from testtime.bench.ledger import seal
from testtime.bench.summary import compare
from testtime.bench.table import latex, markdown

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from testtime.bench.report import page, verdict

SHIFTS = ("fog:5", "contrast:5")


def made(method, errors, seed=0, shifts=SHIFTS, protocol="continual", **changes):
    parts = {
        shift: {
            "error": error,
            "error_interval": [error - 0.02, error + 0.02],
            "source_error": 0.4,
            "gain_interval": [0.4 - error - 0.02, 0.4 - error + 0.02],
            "ece": 0.1,
            "nll": 1.0,
            "histogram_entropy": 2.2,
            "label_entropy": 2.3,
            **changes.get(shift, {}),
        }
        for shift, error in zip(shifts, errors, strict=True)
    }
    return seal(
        {
            "key": f"{method} {seed} {shifts}",
            "spec": {
                **{"method": method, "shifts": list(shifts), "protocol": protocol},
                **{"batch_size": 64, "seed": seed, "order": "natural", "window": 0},
            },
            "model": {"name": "net", "sha256": "m", "preprocessing": "none"},
            "data": {
                **{"name": "digits", "count": 9, "sha256": "d", "sha256_of": "file"},
                "order": "as stored",
            },
            "method": {"name": method, "configuration": {"steps": "1"}},
            "versions": {"code": "c", "testtime": "0", "torch": "2", "python": "3"},
            "status": "done",
            "results": {"clean_error_after": 0.1, "error_over_stream": [0.3] * 20},
            "shifts": parts,
            "adapts": {"tensors": 3, "share": 0.01},
            "skipped": 0,
            "forwards": 1.0,
            "backwards": 1.0,
            "said": ["<b>said</b>"],
            "command": "testtime bench",
            "measured": {
                **{"seconds_per_image": {"median": 1e-3, "p95": 2e-3}, "peak_mib": 5.0},
                **{"finished": "2026-01-01T00:00:00", "host": "h", "device": "cpu", "threads": 2},
            },
        }
    )


def failed(method):
    row = made(method, (0.1, 0.1))
    kept = {k: row[k] for k in ("key", "spec", "model", "data", "method", "versions", "measured")}
    return seal({**kept, "status": "failed", "error": "ValueError: it does not fit"})


LEDGER = Ledger(
    [
        made("source", (0.4, 0.4)),
        made("tent", (0.2, 0.3)),
        made("bn", (0.22, 0.3)),
        made("cotta", (0.6, 0.9), **{"contrast:5": {"histogram_entropy": 0.2}}),
        failed("eata"),
    ]
)


def test_the_verdict_names_the_best_its_interval_and_what_failed():
    (comparison,) = compare(LEDGER)
    assert verdict(comparison) == [
        "Lowest error: tent, 25.0 % (95 % interval 23.0 to 27.0 %).",
        "Against the unadapted source on the same images: "
        "+15.0 points of accuracy (+13.0 to +17.0).",
        "Not clearly behind it: bn.",
        "Clearly worse than not adapting: cotta.",
        "Collapsed to few classes: cotta under contrast:5.",
        "Failed: eata.",
    ]


def test_methods_are_ranked_and_their_numbers_are_those_of_the_rows():
    (comparison,) = compare(LEDGER)
    assert [line.method for line in comparison.lines] == ["tent", "bn", "source", "cotta", "eata"]
    cotta = comparison.lines[3]
    assert cotta.error == pytest.approx(0.75)
    assert cotta.worst == ("contrast:5", 0.9)
    assert cotta.gain == pytest.approx(-0.35)


def test_clean_images_have_no_part_in_a_mean_over_shifts():
    rows = [made("tent", (0.0, 0.3), shifts=("clean", "fog:5"))]
    (line,) = compare(rows)[0].lines
    assert line.error == pytest.approx(0.3)
    assert line.error_interval == pytest.approx((0.28, 0.32))
    assert line.by_shift["clean"] == 0.0
    (alone,) = compare([made("tent", (0.1,), shifts=("clean",))])[0].lines
    assert alone.error == pytest.approx(0.1)


def test_over_seeds_the_interval_is_students():
    rows = [made("tent", (e, e), seed=k) for k, e in enumerate((0.1, 0.2, 0.3))]
    (line,) = compare(rows)[0].lines
    low, high = line.error_interval
    assert (low + high) / 2 == pytest.approx(0.2)
    assert high - low > 0.4


def test_means_over_different_shifts_are_not_compared_in_silence():
    rows = [made("tent", (0.1,), shifts=("fog:5",)), made("bn", (0.2, 0.3))]
    assert not compare(rows)[0].even
    assert "their means are not comparable" in markdown(compare(rows))
    assert "their means are not comparable" in page(Ledger(rows))


def test_markdown_and_latex():
    table = markdown(compare(LEDGER))
    assert "| `tent` | **20.00** | **30.00** | **25.00** | 23.00 to 27.00 |" in table
    assert "| `bn` | 22.00 | **30.00** | 26.00 | 24.00 to 28.00 |" in table
    assert "eata failed: ValueError: it does not fit" in table
    text = latex(compare(LEDGER))
    assert "tent & \\textbf{20.00} & \\textbf{30.00}" in text
    assert text.count("{") == text.count("}")


def test_the_page_is_one_file_that_asks_for_nothing_and_escapes_what_it_shows():
    html = page(LEDGER)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"', html)
    assert "@import" not in html
    assert "url(http" not in html
    assert "&lt;b&gt;said&lt;/b&gt;" in html
    assert page(LEDGER) == html
    with pytest.raises(ValueError, match="holds no rows"):
        page(Ledger())


def test_a_thousand_rows_stay_under_two_megabytes():
    rows = [
        made(f"tent:lr={lr}", (0.2,), seed, (f"fog:{severity}",), protocol)
        for lr in (1e-4, 3e-4, 1e-3, 1e-2)
        for seed in range(5)
        for severity in range(1, 6)
        for protocol in map(str, range(10))
    ]
    assert len(rows) == 1000
    assert len(page(Ledger(rows)).encode()) < 2e6


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

CLICK = """<script>
window.errors = [];
window.addEventListener("error", event => window.errors.push(event.message));
window.addEventListener("load", () => {
  const table = document.querySelector("table.board");
  const first = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.trim());
  const before = first();
  table.tHead.rows[0].cells[1].firstElementChild.click();
  const after = first();
  const asked = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({before, after, asked, errors: window.errors,
    wide: document.documentElement.scrollWidth > window.innerWidth});
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_it_sorts_without_errors_requests_or_overflow(tmp_path, width):
    import json

    (tmp_path / "page.html").write_text(page(LEDGER).replace("</head>", f"{CLICK}</head>"))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-background-networking"),
            *(f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", str(tmp_path / "page.html")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)
    found = json.loads(title.replace("&quot;", '"').replace("&amp;", "&"))
    assert found["before"][0] == "tent"
    assert found["after"] == found["before"][::-1]  # it was ascending: a click turns it round
    assert found["asked"] == found["errors"] == []
    assert not found["wide"]
