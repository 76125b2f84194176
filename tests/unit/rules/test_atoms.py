"""Pieces of dims, as views cut them and operators tie them."""

from shardc.rules.factors.atoms import Atoms


def test_pieces_that_are_cut_alike_are_tied_piece_by_piece() -> None:
    atoms = Atoms()
    one, other = atoms.new(24), atoms.new(24)
    for ref in (one, other):
        assert atoms.regroup([ref], [4, 6]) is not None
    assert atoms.unify([one], [other])
    assert list(map(atoms.piece, atoms.leaves([one]))) == list(map(atoms.piece, atoms.leaves([other])))
    assert atoms.sizes(one) == atoms.sizes(other) == (4, 6)


def test_a_whole_piece_is_cut_as_the_one_it_is_tied_to() -> None:
    for turned in (False, True):
        atoms = Atoms()
        cut, whole = atoms.new(24), atoms.new(24)
        atoms.regroup([cut], [2, 3, 4])
        assert atoms.unify([whole], [cut]) if turned else atoms.unify([cut], [whole])
        assert atoms.sizes(whole) == (2, 3, 4)
        atoms.split(atoms.leaves([cut])[2], 2)
        assert atoms.sizes(whole) == (2, 3, 2, 2)


def test_pieces_that_are_cut_otherwise_are_refined_or_have_nothing_in_common() -> None:
    atoms = Atoms()
    one, other, odd = (atoms.new(24) for _ in range(3))
    atoms.regroup([one], [4, 6])
    atoms.regroup([other], [2, 12])
    atoms.regroup([odd], [3, 8])
    assert atoms.unify([one], [other]) and atoms.sizes(one) == atoms.sizes(other) == (2, 2, 6)
    assert not atoms.unify([one], [odd])


def test_a_piece_that_stands_twice_is_cut_in_both_places() -> None:
    atoms = Atoms()
    ref = atoms.new(6)
    dims = atoms.regroup([ref, ref], [6, 2, 3])
    assert dims is not None and [tuple(map(atoms.size, dim)) for dim in dims] == [(2, 3), (2,), (3,)]
    assert atoms.regroup([ref], [4, 2]) is None
