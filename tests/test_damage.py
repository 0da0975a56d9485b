from bench_damage import damage_figures


def test_every_truncation_and_flipped_bit_is_noticed_and_none_is_used(tmp_path):
    figures = damage_figures(str(tmp_path), count=500)
    for kind in ("truncations", "flipped bits"):
        assert figures[kind]["ours"] == {"noticed": 500}, kind
        assert figures[kind]["webdataset"]["noticed"] < 500  # why the checks are needed
