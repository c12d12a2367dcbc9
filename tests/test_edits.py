"""Corrections by hand: what each does, that it is undone, and that nothing is lost."""
import json
import threading

import numpy as np
import pytest

import edits
import images


def test_an_export_of_before_takes_no_edit_away(tmp_path):
    """Made while infer.py wrote the tables, in an image that was closed and opened again."""
    labels = np.zeros((40, 40), np.int32)
    labels[5:15, 5:15], labels[20:30, 20:30] = 1, 2
    first = edits.Book(tmp_path / "a", (40, 40))
    first.do(edits.Edit("draw", (slice(0, 40), slice(0, 40)), first.labels.copy(), labels))
    first.save()
    first.do(edits.remove_cells(first, [1]))
    first.save()
    book = edits.Book(tmp_path / "a", (40, 40))
    images.write_labels(tmp_path / "a_labels.tif", np.asarray(labels))       # as it was exported
    assert not book.look() and book.outside == 0 and set(np.unique(book.labels)) == {0, 2}
    book.save()
    assert set(np.unique(images.read_labels(tmp_path / "a_labels.tif"))) == {0, 2}
    for theirs in (labels[::-1].copy(), np.where(book.labels, 3, 0)):        # another program's
        images.write_labels(tmp_path / "a_labels.tif", theirs)
        assert book.look() and np.array_equal(book.labels, theirs)
    fresh = edits.Book(tmp_path / "b", (40, 40))                             # nothing was edited
    images.write_labels(tmp_path / "b_labels.tif", labels)
    assert fresh.look() and np.array_equal(fresh.labels, labels)


def circle(y, x, r, n=40):
    t = np.linspace(0, 2 * np.pi, n)
    return np.stack((x + r * np.cos(t), y + r * np.sin(t)), 1)


@pytest.fixture
def book(tmp_path):
    """Two discs that touch, one alone, on 80 x 120 px."""
    labels = np.zeros((80, 120), np.int32)
    y, x = np.mgrid[:80, :120]
    labels[(y - 30) ** 2 + (x - 30) ** 2 < 144] = 1
    labels[((y - 30) ** 2 + (x - 54) ** 2 < 144) & (labels == 0)] = 2
    labels[(y - 60) ** 2 + (x - 95) ** 2 < 100] = 5
    images.write_labels(tmp_path / "a_labels.tif", labels)
    return edits.Book(tmp_path / "a", (80, 120))


def cells_of(book):
    return set(np.unique(book.labels)) - {0}


def consistent(book):
    """Boxes are those of the labels, and every cell's number is below the next."""
    for cell in cells_of(book):
        y, x = np.nonzero(book.labels == cell)
        assert book.boxes[cell] == (slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1))
    assert set(book.boxes) == cells_of(book) and book.fresh > max(cells_of(book), default=0)


@pytest.mark.smoke
def test_draw_makes_a_disc_and_leaves_others_their_pixels(book):
    before = book.labels.copy()
    book.do(edits.draw_cell(book, circle(60, 20, 10)))
    new = book.labels == 6
    assert abs(new.sum() - np.pi * 100) < 12 and (book.labels[before > 0] == before[before > 0]
                                                  ).all()
    book.do(edits.draw_cell(book, circle(38, 40, 10)))          # over both discs
    assert (book.labels[before == 1] == 1).all() and (book.labels[before == 2] == 2).all()
    consistent(book)


def test_draw_begun_in_a_cell_adds_to_it(book):
    area = (book.labels == 5).sum()
    book.do(edits.draw_cell(book, np.concatenate(([[95., 60.]], circle(60, 108, 8)))))
    assert (book.labels == 5).sum() > area + 60 and len(cells_of(book)) == 3
    consistent(book)


def test_split_across_and_refusal_of_a_line_that_ends_inside(book):
    area = (book.labels == 5).sum()
    book.do(edits.split_cells(book, np.array([[95.5, 45.], [95.5, 75.]])))
    assert cells_of(book) == {1, 2, 6, 7} and (np.isin(book.labels, (6, 7))).sum() == area
    sizes = [(book.labels == i).sum() for i in (6, 7)]
    assert min(sizes) > 0.4 * area
    consistent(book)
    with pytest.raises(edits.Refused, match="from edge to edge"):
        edits.split_cells(book, np.array([[30., 10.], [30., 30.]]))
    with pytest.raises(edits.Refused, match="no cell"):
        edits.split_cells(book, np.array([[2., 70.], [20., 75.]]))


@pytest.mark.parametrize("angle", np.linspace(0, np.pi, 7))
def test_every_direction_splits(book, angle):
    """A line of one pixel has no gap at its diagonals."""
    away = 30 * np.array([np.cos(angle), np.sin(angle)])
    book.do(edits.split_cells(book, np.array([[95, 60] - away, [95, 60] + away])))
    assert len(cells_of(book)) == 4


def test_merge_closes_the_gap(book):
    book.do(edits.merge_cells(book, np.array([[30., 30.], [54., 30.]])))
    assert cells_of(book) == {5, 6}                                         # 1 and 2 are 6 now
    book.do(edits.merge_cells(book, np.array([[54., 30.], [95., 60.]])))    # far apart: a bridge
    assert len(cells_of(book)) == 1
    assert np.array_equal(edits.largest_piece(book.labels > 0), book.labels > 0)
    with pytest.raises(edits.Refused):
        edits.merge_cells(book, np.array([[30., 30.], [35., 30.]]))


def test_remove_and_lasso(book):
    book.do(edits.remove_inside(book, circle(30, 42, 40)))
    assert cells_of(book) == {5}
    with pytest.raises(edits.Refused, match="more than half"):
        edits.remove_inside(book, circle(60, 85, 6))            # only the rim of it
    book.do(edits.remove_cells(book, [5]))
    assert cells_of(book) == set()
    with pytest.raises(edits.Refused):
        edits.remove_cells(book, [5])


def test_erase_makes_cells_of_the_parts(book):
    """One of more than half of the cell is still that cell."""
    area = (book.labels == 5).sum()
    book.do(edits.cut_away(book, np.array([[93., 40], [97, 40], [97, 80], [93, 80]])))
    assert cells_of(book) == {1, 2, 6, 7} and (book.labels[:, 93:97] == 0).all()
    consistent(book)
    book.undo()
    book.do(edits.cut_away(book, np.array([[85., 40], [88, 40], [88, 80], [85, 80]])))
    assert cells_of(book) == {1, 2, 5} and area / 2 < (book.labels == 5).sum() < area
    consistent(book)


def test_grow_then_shrink_of_a_disc_gives_it_back(book):
    before = book.labels.copy()
    book.do(edits.grow_cell(book, 5))
    assert (book.labels == 5).sum() > (before == 5).sum()
    book.do(edits.shrink_cell(book, 5))
    np.testing.assert_array_equal(book.labels, before)
    book.do(edits.grow_cell(book, 1))
    assert (book.labels == 2).sum() == (before == 2).sum()      # not into the neighbour


@pytest.mark.smoke
def test_gestures(book):
    def does(line):
        return edits.edit_gesture(book, np.asarray(line, float)).what
    assert does([[30, 30], [54, 30]]) == "merge"
    assert does([[95, 40], [95, 80]]) == "split"
    assert does(circle(60, 20, 10)) == "draw"
    assert does([[95, 60], *circle(60, 108, 8), [95, 60]]) == "draw"
    with pytest.raises(edits.Refused):
        does([[2, 70], [20, 75]])


def test_undo_and_redo_without_end_and_after_a_restart(book, tmp_path):
    rng = np.random.default_rng(0)
    states = [book.labels.copy()]
    while len(states) < 25:
        line = rng.uniform(0, 80, (rng.integers(2, 6), 2)) + rng.uniform(0, 40, 2) * (1, 0)
        what = [edits.draw_cell, edits.cut_away, edits.split_cells, edits.merge_cells,
                edits.remove_inside][rng.integers(5)]
        try:
            book.do(what(book, line))
        except edits.Refused:
            continue
        states.append(book.labels.copy())
        consistent(book)
    for state in states[-2::-1]:
        book.undo()
        np.testing.assert_array_equal(book.labels, state)
    with pytest.raises(edits.Refused):
        book.undo()
    for state in states[1:10]:
        book.redo()
        np.testing.assert_array_equal(book.labels, state)
    again = edits.Book(tmp_path / "a", (80, 120))               # the TIFF is the first one still
    np.testing.assert_array_equal(again.labels, states[9])
    again.save()
    again = edits.Book(tmp_path / "a", (80, 120))               # and replayed on the last
    np.testing.assert_array_equal(again.labels, states[9])
    again.undo()
    np.testing.assert_array_equal(again.labels, states[8])
    again.redo()
    again.redo()
    np.testing.assert_array_equal(again.labels, states[10])
    consistent(again)


@pytest.mark.parametrize("damage", [b'{"time": "x", "WHAT\n', b'{"time": "x", "what": "undo"}\n',
                                    b'{"time": "x", "what": "draw", "box": [0, 0, 1, 1]}\n'])
def test_a_damaged_journal_is_named(book, tmp_path, damage):
    (tmp_path / "a_journal.jsonl").write_bytes(damage)
    with pytest.raises(ValueError, match="a_journal.jsonl: line 1 is damaged; remove the file"):
        edits.Book(tmp_path / "a", book.shape)


def test_a_journal_cut_by_a_crash_loses_only_what_was_not_confirmed(book, tmp_path):
    book.do(edits.remove_cells(book, [5]))
    with open(tmp_path / "a_journal.jsonl", "ab") as file:
        file.write(b'{"what": "remove", "box": [0')
    again = edits.Book(tmp_path / "a", (80, 120))
    assert cells_of(again) == {1, 2}
    again.do(edits.remove_cells(again, [2]))
    lines = (tmp_path / "a_journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["remove"] * 2


def test_two_programs_on_one_image_do_not_lose_edits(book, tmp_path):
    other = edits.Book(tmp_path / "a", (80, 120))
    other.do(edits.remove_cells(other, [5]))
    with pytest.raises(edits.Stale, match="another program"):
        book.do(edits.remove_cells(book, [1]))
    assert cells_of(book) == {1, 2}                             # it has read the other's edit
    book.do(edits.remove_cells(book, [1]))
    assert cells_of(edits.Book(tmp_path / "a", (80, 120))) == {2}


def test_new_thresholds_keep_what_hands_have_made(book):
    book.do(edits.draw_cell(book, circle(60, 20, 10)))
    mine = book.labels == 6
    book.do(edits.remove_cells(book, [5]))
    gone = ~mine & (book.labels == 0)
    flooded = np.zeros(book.shape, np.int32)
    y, x = np.mgrid[:80, :120]
    flooded[(y - 30) ** 2 + (x - 30) ** 2 < 100] = 1            # smaller now
    flooded[(y - 60) ** 2 + (x - 95) ** 2 < 100] = 2            # deleted by hand: stays so
    flooded[(y - 60) ** 2 + (x - 20) ** 2 < 64] = 3             # drawn by hand: stays larger
    flooded[70:78, 60:70] = 4
    book.do(edits.flooded_edit(book, flooded))
    assert len(cells_of(book)) == 3 and gone[60, 95] and book.labels[60, 95] == 0
    cell = book.labels[60, 20]
    np.testing.assert_array_equal(book.labels == cell, mine)
    assert (book.labels == book.labels[30, 30]).sum() == (flooded == 1).sum()
    consistent(book)
    book.undo()
    assert cells_of(book) == {1, 2, 6}


def test_what_an_edit_leaves_of_a_cell_stays_at_other_thresholds(tmp_path):
    """The rest of a cell that was split, shrunk or cut is as much by hand as what was changed."""
    y, x = np.mgrid[:80, :80]
    found = ((y - 40) ** 2 + (x - 40) ** 2 < 400).astype(np.int32)

    def book(name):
        one = edits.Book(tmp_path / name, found.shape)
        one.do(edits.flooded_edit(one, found, "find"))
        return one

    split = book("split")
    split.do(edits.split_cells(split, np.array([[33., 10.], [33., 70.]])))
    split.do(edits.split_cells(split, np.array([[47., 10.], [47., 70.]])))
    shrunk = book("shrunk")
    for _ in range(7):
        shrunk.do(edits.shrink_cell(shrunk, 1))
    cut = book("cut")
    cut.do(edits.cut_away(cut, np.array([[0., 0.], [80., 0.], [80., 44.], [0., 44.]])))
    for one, count in ((split, 3), (shrunk, 1), (cut, 1)):
        before = one.labels.copy()
        after = edits.flooded_edit(one, found).after
        assert len(np.unique(after[after > 0])) == count
        assert ((after > 0) == (before > 0)).all()
    assert shrunk.by_hand().sum() == found.sum()


def test_a_number_is_not_given_again_after_a_restart(book, tmp_path):
    book.do(edits.draw_cell(book, circle(60, 20, 10)))                       # cell 6
    book.do(edits.remove_cells(book, [6]))
    book.do(edits.remove_cells(book, [5]))
    book.save()
    assert edits.Book(tmp_path / "a", (80, 120)).fresh == book.fresh == 7


def test_saving_beside_edits_ends_with_the_last(book, tmp_path):
    """A thread saves all the time, as the page does."""
    ending = threading.Event()

    def keep():
        while not ending.is_set():
            book.save()
    thread = threading.Thread(target=keep)
    thread.start()
    for _ in range(15):
        book.do(edits.grow_cell(book, 5))
        book.do(edits.shrink_cell(book, 5))
    book.do(edits.remove_cells(book, [1]))
    ending.set()
    thread.join()
    book.save()
    np.testing.assert_array_equal(images.read_labels(tmp_path / "a_labels.tif"), book.labels)


def test_labels_of_another_size_are_refused(book, tmp_path):
    with pytest.raises(ValueError, match="a_labels.tif: labels of"):
        edits.Book(tmp_path / "a", (80, 121))


def test_lines_outside_of_the_image(book):
    book.do(edits.draw_cell(book, circle(78, 118, 10)))         # cut by the corner
    assert book.labels[79, 119] == 6
    with pytest.raises(edits.Refused):
        edits.draw_cell(book, circle(300, 300, 10))
    with pytest.raises(edits.Refused):
        edits.split_cells(book, circle(300, 300, 10))
    consistent(book)


def test_labels_that_another_program_wrote_are_one_edit(book, tmp_path):
    """A label file of any earlier state is replayed to the last; one that never was the book's is
    what counts, and undo gives the book's back."""
    path, journal = tmp_path / "a_labels.tif", tmp_path / "a_journal.jsonl"
    states = [book.labels.copy()]
    for edit in (lambda: edits.merge_cells(book, np.array([[30., 30.], [54., 30.]])),
                 lambda: edits.flooded_edit(book, np.roll(book.labels, 3, 1), "find"),
                 lambda: edits.grow_cell(book, 5), lambda: edits.remove_cells(book, [5])):
        book.do(edit())
        states.append(book.labels.copy())
    book.undo()
    states.append(book.labels.copy())
    lines = journal.read_bytes()
    for state in states:
        images.write_labels(path, state)
        np.testing.assert_array_equal(edits.Book(tmp_path / "a", (80, 120)).labels, states[-1])
        assert journal.read_bytes() == lines
    foreign = states[1].copy()
    foreign[2:8, 2:8] = 50
    images.write_labels(path, foreign)
    again = edits.Book(tmp_path / "a", (80, 120))
    np.testing.assert_array_equal(again.labels, foreign)
    assert b'"outside"' in journal.read_bytes().splitlines()[-1] and again.fresh == 51
    consistent(again)
    again.undo()
    np.testing.assert_array_equal(again.labels, states[-1])
    again.redo()
    np.testing.assert_array_equal(edits.Book(tmp_path / "a", (80, 120)).labels, foreign)


def test_labels_of_another_program_come_into_an_open_book(book):
    book.do(edits.remove_inside(book, circle(30, 42, 40)))
    book.save()
    ours, theirs = book.labels.copy(), np.zeros(book.shape, np.int32)
    images.write_labels(book.path, ours)                       # the same: nothing happens
    revision = book.revision
    assert not book.look() and book.revision == revision
    theirs[10:20, 10:20] = 7
    images.write_labels(book.path, theirs)
    with pytest.raises(edits.Stale, match="_labels.tif was changed by another program"):
        book.undo()
    assert np.array_equal(book.labels, theirs)
    book.undo()
    assert np.array_equal(book.labels, ours)
    book.save()
    assert np.array_equal(images.read_labels(book.path), ours)
    before, revision = book.labels.copy(), book.revision + 1
    book.do(edits.grow_cell(book, max(book.boxes)))
    book.save()
    images.write_labels(book.path, before)  # as an export ends
    assert not book.look() and book.revision == revision
    book.save()
    ours = book.labels.copy()
    assert np.array_equal(images.read_labels(book.path), ours)
    book.path.write_bytes(b"no labels")
    with pytest.raises(ValueError):
        book.look()
    assert np.array_equal(book.labels, ours)
