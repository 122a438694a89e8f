"""benchmarks/attention.py: rows by mask, whose memory grows with the tokens."""

from files import module_of


def test_rows(capsys):
    benchmark = module_of("benchmarks/attention.py")
    rows = [
        benchmark.row(name, tokens, calls=1)
        for name in benchmark.MASKS
        for tokens in (512, 1024)
    ]
    assert {(each["attention"], each["tokens"]) for each in rows} == {
        (name, tokens) for name in benchmark.MASKS for tokens in (512, 1024)
    }
    for short, long in zip(rows[::2], rows[1::2], strict=True):
        assert short["seconds"] > 0 and long["seconds"] > 0
        assert short["temp_bytes"] < long["temp_bytes"] < 2 * short["temp_bytes"]
    benchmark.print_table(rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in benchmark.MASKS)
