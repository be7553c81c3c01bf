"""Errors of a quantized base: bf16 is its own reference, and more bits err less."""

from benchmarks import base_errors


def test_more_bits_err_less_on_a_small_flux(capsys):
    network, call = base_errors.flux_network(0)
    bf16, fp8, int8, int4 = base_errors.measure_errors(network, call)
    assert bf16.against_bf16 == 0 and bf16.bits == 16
    assert bf16.layer < int8.layer < fp8.layer < int4.layer < 0.12
    assert 4 < int4.bits < 4.2 < fp8.bits < int8.bits < 8.5
    assert int8.against_bf16 < fp8.against_bf16 < int4.against_bf16
    assert base_errors.main(["--network", "toy"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:]] == [
        "| bf16", "| fp8", "| int8", "| int4"
    ]  # fmt: skip
