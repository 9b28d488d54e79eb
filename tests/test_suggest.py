from testtime._suggest import suggest


def test_the_nearest_name_is_asked_for():
    assert suggest("tnet", ["source", "tent", "bn"]) == " Did you mean 'tent'?"


def test_case_counts_for_nothing():
    assert suggest("TENT", ["BNAdapt", "Tent"]) == " Did you mean 'Tent'?"


def test_nothing_near_nothing_said():
    assert suggest("bench", ["source", "tent"]) == ""
    assert suggest("bench", []) == ""
