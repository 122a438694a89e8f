"""benchmarks/attention.py: rows, whose memory grows with the tokens."""

from files import module_of


def test_rows(capsys):
    benchmark = module_of("benchmarks/attention.py")
    short, long = (benchmark.rows_of(tokens, rounds=1) for tokens in (512, 1024))
    for rows, tokens in ((short, 512), (long, 1024)):
        assert {each["attention"] for each in rows} == set(benchmark.ROWS)
        assert all(each["tokens"] == tokens and each["seconds"] > 0 for each in rows)
        assert all(
            (each["times_dense"] == 1) == (each["attention"] == benchmark.DENSE)
            for each in rows
        )
    for one, other in zip(short, long, strict=True):
        # All pairs would take four times as much.
        assert one["temp_bytes"] < other["temp_bytes"] < 3 * one["temp_bytes"]
    benchmark.print_table(short + long)
    printed = capsys.readouterr().out
    assert all(name in printed for name in benchmark.ROWS)
