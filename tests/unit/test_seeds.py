from lorabbit.runtime.seeds import derive_seed, generator


def test_a_seed_depends_on_every_part_of_its_purpose():
    seeds = {derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(0, "a", 1)}

    assert len(seeds) == 5


def test_parts_do_not_run_together():
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


def test_a_seed_is_the_same_on_every_machine():
    # first 8 bytes of sha256("7\x1ftrain\x1f3"), shifted right by one bit
    assert derive_seed(7, "train", 3) == int.from_bytes(bytes.fromhex("8dde1059a5532ece"), "big") >> 1


def test_generators_of_one_purpose_agree():
    assert generator(5, "x").random() == generator(5, "x").random()
