"""The plan of a run of several lengths: the longest compiled, all of them listed."""

import json
import re

import pytest

from ulysses_jax.plan.__main__ import main

LENGTHS = ["--data.lengths", "256", "512", "1024"]
GPUS = ["--gpus", "h100:1x8"]


def test_the_longest_is_compiled_and_all_are_listed(
    config_file, planted, tmp_path, capsys
):
    target = tmp_path / "plan.json"
    asked = ["--config", str(config_file), *GPUS, "--json", str(target)]
    main([*asked, "--data.mask-documents=true", *LENGTHS])
    (request,) = planted()
    assert request["config"]["training"]["sequence_tokens"] == 1024
    assert request["config"]["data"]["lengths"] == []
    assert request["config"]["data"]["mask_documents"] is False
    rows = json.loads(target.read_text())["lengths"]
    assert [(row["tokens"], row["rows"]) for row in rows] == [
        (256, 16),
        (512, 8),
        (1024, 4),
    ]
    meshes = [(row["mesh"]["fsdp"], row["mesh"]["seq"]) for row in rows]
    assert meshes == [(8, 1), (8, 1), (2, 4)]
    # Products grow with tokens, which are the same; attention with the length.
    attention = [row["model_flops"] * row["attention_fraction"] for row in rows]
    assert attention[1] / attention[0] == pytest.approx(2, rel=0.01)
    assert attention[2] / attention[0] == pytest.approx(4, rel=0.01)
    others = [a["model_flops"] - b for a, b in zip(rows, attention, strict=True)]
    assert others == pytest.approx([others[0]] * 3)
    out = capsys.readouterr().out
    assert re.search(r"256 +16 +fsdp=8 +ulysses", out)
    assert re.search(r"1,024 +4 +fsdp=2 x seq=4 +ulysses .* 1.00 ", out)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--longest"], "--longest is of rows of one length .*: leave one of them out"),
        (["--documents-of-data"], "--documents-of-data is of rows of one length"),
        (["--model.strategy=all_gather"], "data.lengths 256: strategy all_gather"),
    ],
)
def test_refused_before_anything_is_compiled(
    config_file, plant_worker, capsys, options, message
):
    plant_worker("raise SystemExit('compiled all the same')")
    with pytest.raises(SystemExit):
        main(["--config", str(config_file), *GPUS, *options, *LENGTHS])
    assert re.search(message, capsys.readouterr().err)
