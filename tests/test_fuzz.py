"""A few of the damaged inputs of fuzz.py, of the kinds that need no second stage."""

import fuzz

def test_damaged_inputs_are_refused_in_one_line_or_change_nothing(monkeypatch):
    monkeypatch.setattr(fuzz.ldmseg, "prepare", fuzz.ldmseg.prepare)  # set_up's note of records
    fuzz.set_up(["ae"])
    names = ("pair: JSON", "pair: PNG", "data: panoptic", "data: instances", "weights")
    kinds = {name: fuzz.KINDS[name] for name in names}
    cases = {number: fuzz.run_case(2, number, kinds) for number in range(25)}
    bad = {number: case for number, case in cases.items() if case[1].isupper()}
    assert not bad and {case[1] for case in cases.values()} == {"refused", "accepted"}
