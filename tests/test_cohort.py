"""cohort.py: tiles and tables of donors; statistics against SciPy, closed forms and simulations."""
import itertools
import math
import re
import sys
import time

import numpy as np
import pytest
import tifffile
from conftest import ROOT
from scipy import stats

import cohort
import runs

sys.path.insert(0, str(ROOT / "bench"))
import simulate_cohorts  # noqa: E402

PATTERN = r"b0c(?P<channel>\d+)"


# ----------------------------------------------------------------------------- tiles and thresholds

def test_marker_of_cells():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 6, (40, 50))
    marker = rng.integers(0, 60000, (40, 50)).astype(np.uint16)
    cells = [marker[labels == i] for i in range(1, 6)]
    assert cohort.marker_of_cells(labels, marker) == pytest.approx([cell.mean() for cell in cells],
                                                                   rel=1e-14)
    for percentile in (0, 33.3, 75, 100):
        assert cohort.marker_of_cells(labels, marker, percentile) == pytest.approx(
            [np.percentile(cell, percentile) for cell in cells], rel=1e-14)
    for percentile in (None, 50):
        assert len(cohort.marker_of_cells(labels * 0, marker, percentile)) == 0


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith((".tif", ".tiff")):
            tifffile.imwrite(folder / name, np.zeros((4, 4), np.uint16))
        else:
            (folder / name).write_text("")


@pytest.mark.smoke
def test_tiles_are_pairs(tmp_path):
    touch(tmp_path, "donor_1/s2b0c0x7-9.tif", "donor_1/s2b0c1x7-9.tif", "donor_2/a_b0c0.tiff",
          "donor_2/a_b0c1.TIF", "donor_2/only_b0c0.tif", "donor_2/alone_b0c1.tif",
          "donor_2/a_b0c2.tif", "donor_2/info.xml", "x/b0c0.tif", "x/b0c1.tif",
          ".hidden/donor_3_b0c0.tif", "donor_2/twice_b0c0.tif", "donor_2/twice_b0c0.tiff",
          "donor_2/twice_b0c1.tif", "donor_2/a_b0c0.png.txt")
    tiles, unusable, others = cohort.find_tiles(tmp_path, PATTERN)
    assert [tile[:2] for tile in tiles] == [("donor_1/s2b0c0x7-9", "1"), ("donor_2/a_b0c0", "2")]
    assert [path.name for path in tiles[1].files] == ["a_b0c0.tiff", "a_b0c1.TIF"] and others == 3
    assert sorted(unusable) == ["donor_2/alone_b0c0", "donor_2/only_b0c0", "donor_2/twice_b0c0",
                                "x/b0c0"]
    assert unusable["donor_2/only_b0c0"] == "no images of the marker"
    assert unusable["donor_2/twice_b0c0"].startswith("2 images of the nuclei twice_b0c0.tif, ")
    assert "no donor" in unusable["x/b0c0"]
    tiles, _, _ = cohort.find_tiles(tmp_path, PATTERN, donor="^([^/_]+)")
    assert [tile.donor for tile in tiles] == ["donor", "donor", "x"]
    swapped = cohort.find_tiles(tmp_path, r"c(?P<channel>\d)(?=x7|\.|$)", "1", "0")[0][0]
    assert [path.name for path in swapped.files] == ["s2b0c1x7-9.tif", "s2b0c0x7-9.tif"]


@pytest.mark.parametrize("folders", [("donor_A-01", "donor_A-02"), ("donor_1", "donor_1.0"),
                                     ("x/donor_1-left_2", "donor_1"),
                                     ("case_control/donor_7-01", "case_control/donor_7-02")])
def test_folders_that_would_be_one_donor_by_mistake(tmp_path, folders):
    for folder in folders:
        touch(tmp_path, f"{folder}/t_b0c0.tif", f"{folder}/t_b0c1.tif")
    with pytest.raises(ValueError) as error:
        cohort.find_tiles(tmp_path, PATTERN)
    said = str(error.value)
    assert all(folder.rpartition("/")[2] in said for folder in folders)
    assert "give donor=" in said and "\n" not in said
    assert len(cohort.find_tiles(tmp_path, PATTERN, donor="donor_([^/]+)")[0]) == 2


def test_folders_and_files_of_one_donor(tmp_path):
    names = ("donor_7/slide_1/a-1", "donor_7/slide_2/a-2", "b/donor_7_left/a", "b/donor_7_right/a",
             "donor_7-tile3", "donor_7-tile4", "c/donor_7.1", "donor_8-2/a", "donor_8-2_right/a")
    touch(tmp_path, *(f"{name}_b0c{channel}.tif" for name in names for channel in "01"))
    tiles = cohort.find_tiles(tmp_path, PATTERN)[0]
    assert sorted(tile.donor for tile in tiles) == ["7"] * 7 + ["8"] * 2


def test_folders_without_tiles(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cohort.find_tiles(tmp_path / "none", PATTERN)
    with pytest.raises(ValueError, match=r"has no group \(\?P<channel>"):
        cohort.find_tiles(tmp_path, r"b0c(\d)")
    with pytest.raises(ValueError, match="no tiles; none of its 0 files"):
        cohort.find_tiles(tmp_path, PATTERN)
    touch(tmp_path, "a.tif", "meta.xml")
    with pytest.raises(ValueError, match="no tiles; none of its 2 files is a .tif"):
        cohort.find_tiles(tmp_path, PATTERN)
    touch(tmp_path, "b0c0.tif", "b0c1.tif")
    with pytest.raises(ValueError, match="none of 1 tiles can be used; b0c0: no donor"):
        cohort.find_tiles(tmp_path, PATTERN)


def test_files_of_a_tile_must_fit(tmp_path):
    nuclei, marker = tmp_path / "b0c0.tif", tmp_path / "b0c1.tif"
    tile = cohort.TilePair("t", "d", (nuclei, marker))
    tifffile.imwrite(nuclei, np.full((4, 5), 3, np.uint16))
    tifffile.imwrite(marker, np.full((4, 5), 7, np.uint16))
    assert cohort.read_tile(tile)[:, 0, 0].tolist() == [3, 7]
    for wrong, said in ((np.zeros((5, 4), np.uint16), "expected one channel, as large as b0c0.tif"),
                        (np.zeros((4, 5), np.uint8), "pixels of uint8, expected uint16")):
        tifffile.imwrite(marker, wrong)
        with pytest.raises(ValueError, match=said):
            cohort.read_tile(tile)


@pytest.mark.smoke
def test_thresholds():
    rng = np.random.default_rng(8)
    lines = [{"donor": name, "tile": f"{name}{i}", "dtype": "uint16",
              "intensity": list(rng.normal(centre, 1, 40))}
             for name, centre in (("a", 0), ("b", 20), ("control", 1)) for i in range(3)]
    every = np.concatenate([line["intensity"] for line in lines])
    assert cohort.marker_threshold(lines, "otsu", controls=["zz"]) == cohort.otsu_threshold(every)
    assert 5 < cohort.otsu_threshold(every) < 16
    assert cohort.marker_threshold(lines, "fixed", 7.5) == 7.5
    assert cohort.marker_threshold(lines, "controls", controls=["control"]) == pytest.approx(
        np.percentile(every[-120:], 99))
    with pytest.raises(ValueError, match="controls=zz: no tiles of it; donors are a, b, control"):
        cohort.marker_threshold(lines, "controls", controls=["zz"])
    lines[0]["dtype"] = "uint8"
    with pytest.raises(ValueError, match=r"tiles have pixels of uint8 \(a0\), uint16 \(a1\)"):
        cohort.marker_threshold(lines, "fixed", 7.5)
    bare = [{**lines[0], "intensity": []}]
    with pytest.raises(ValueError, match="threshold=otsu: marker intensities are 0 values"):
        cohort.marker_threshold(bare, "otsu")
    with pytest.raises(ValueError, match="controls=a: no cells in their tiles"):
        cohort.marker_threshold(bare, "controls", controls=["a"])


# ------------------------------------------------------------------------------- tables of outcomes

@pytest.mark.parametrize("text,said", [
    ("donor\ty\na\t1\nb\t2\na\t3\n", "line 4: donor a stands in line 2 already"),
    ("donor\ty\na\t1\nb\tfew\n", "line 3, donor b: y is 'few', expected a number"),
    ("donor\ty\na\tinf\n", "line 2, donor a: y is 'inf'"),
    ("donor\tY\ty2\na\t1\t1\n", "no columns 'y', expected one; did you mean"),
    ("donor\ty\n\t1\n", "line 2: no donor in column donor"),
    ("", "no columns 'donor', expected one"),
])
def test_outcome_tables_with_mistakes(tmp_path, text, said):
    (tmp_path / "o.tsv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        cohort.read_donors(tmp_path / "o.tsv", ["y"])
    assert "o.tsv" in str(error.value) and "\n" not in str(error.value)


def test_outcome_tables_as_people_write_them(tmp_path):
    (tmp_path / "o.csv").write_text(
        '\ufeffdonor, y ,sex,batch\n"007", 1.5,f,x\n8,NA,,x\n9,-3e2,m,x\n,,,\n\n', "utf-8")
    found = cohort.read_donors(tmp_path / "o.csv", ["y"], categories=["sex", "batch"])
    assert found.names == ["007", "8", "9"]
    assert np.array_equal(found.outcomes, [[1.5, np.nan, -300]], equal_nan=True)
    assert np.array_equal(found.covariates, [[0, np.nan, 1]], equal_nan=True)    # of one batch
    assert found.columns == ["sex"]
    (tmp_path / "t.csv").write_text("donor,y,drug\na,1,none\nb,2,NA\nc,3,statin\n")
    found = cohort.read_donors(tmp_path / "t.csv", ["y"], categories=["drug"])
    assert np.array_equal(found.covariates, [[0, np.nan, 1]], equal_nan=True)  # none is a treatment
    (tmp_path / "t.csv").write_text("donor,y,drug\na,1,none\nb,2,.\nc,3,statin\n")   # as SAS has it
    again = cohort.read_donors(tmp_path / "t.csv", ["y"], categories=["drug"])
    assert np.array_equal(again.covariates, found.covariates, equal_nan=True)
    assert cohort.read_donors(tmp_path / "t.csv", ["y"]).covariates.shape == (0, 3)


@pytest.mark.parametrize("rows, said", [
    ('1\t"tall\t3\n2\t\t5\n3\tsmall\t7\n', "unexpected end"),          # 1 would get 3's outcome
    ('1\t"tall\t3\n2\t\t5\n3\tsmall"\t7\n', "line 2: a cell in quotes goes on"),
    ('1\t"tall" man\t3\n', "expected after"), ('1\t"two\nlines"\t3\n', "line 2: a cell"),
    ('1\t"odd\n', "unexpected end")])
def test_quotes_do_not_swallow_lines(tmp_path, rows, said):
    (tmp_path / "o.tsv").write_text("donor\tremark\ty\n" + rows)
    with pytest.raises(ValueError, match=said) as error:
        cohort.read_donors(tmp_path / "o.tsv", ["y"])
    assert "o.tsv: not a table of text" in str(error.value) and "\n" not in str(error.value)


def test_quoted_cells_are_read(tmp_path):
    (tmp_path / "o.tsv").write_text('donor\tremark\ty\n"1"\t"a ""tall"", man"\t3\n'
                                    '2\t5" and\x0c6"\t4\n', "utf-8")
    assert runs.read_table(tmp_path / "o.tsv") == [
        {"donor": "1", "remark": 'a "tall", man', "y": "3"},
        {"donor": "2", "remark": '5" and\x0c6"', "y": "4"}]


# --------------------------------------------------------------------------------------- statistics

@pytest.mark.smoke
@pytest.mark.parametrize("n,levels", [(30, 6), (200, 6), (200, 100000), (500, 3)])
def test_spearman_is_scipys(n, levels):
    rng = np.random.default_rng((n, levels))
    x = rng.integers(0, levels, (4, n)).astype(float)
    y = 0.4 * x + rng.integers(0, levels, (4, n))
    found = cohort.spearman(x, y)
    for i in range(4):
        expected = stats.spearmanr(x[i], y[i])
        assert abs(found[i] - expected.statistic) < 1e-12
        assert abs(cohort.p_value(found[i], n) - expected.pvalue) < 1e-12


@pytest.mark.smoke
def test_false_discovery_is_scipys_also_in_rows_and_around_what_is_missing():
    p = np.random.default_rng(0).random((5, 4, 12)) ** 3
    p[0, 0, :3] = p[0, 0, 3]  # ties
    q = cohort.false_discovery(p)
    assert np.abs(q - stats.false_discovery_control(p, axis=-1)).max() < 1e-12
    with_missing = np.insert(p, 5, np.nan, axis=-1)  # no member of the family
    again = cohort.false_discovery(with_missing)
    assert np.isnan(again[..., 5]).all() and np.array_equal(np.delete(again, 5, -1), q)
    assert np.isnan(cohort.false_discovery(np.full(3, np.nan))).all()


@pytest.mark.smoke
def test_interval_is_bonetts_and_wrights():
    """By hand: rho 0.5 of 103 donors: atanh 0.5 ± 1.959964 sqrt(1.125 / 100)."""
    low, high = cohort.donor_interval(0.5, 103)
    reach = 1.959963984540054 * math.sqrt(0.01125)
    assert low == pytest.approx(math.tanh(math.atanh(0.5) - reach), abs=1e-12)
    assert high == pytest.approx(math.tanh(math.atanh(0.5) + reach), abs=1e-12)
    assert np.array(cohort.donor_interval(0.5, 105, 2)) == pytest.approx(np.array([low, high]),
                                                                         abs=1e-14)
    undefined = np.array([1.0, -1.0, np.nan, 0.2]), np.array([50, 50, 50, 3])
    assert np.isnan(cohort.donor_interval(*undefined)).all()


@pytest.mark.parametrize("n", [5, 6])
def test_few_donors_have_an_exact_p(n):
    """Every order of y, one by one, with SciPy's rho."""
    x, y = np.random.default_rng(n).integers(0, 5, (2, n)).astype(float)
    whole = abs(stats.spearmanr(x, y).statistic)
    orders = [abs(stats.spearmanr(x, order).statistic) for order in itertools.permutations(y)]
    found = cohort.donor_association(x, y)
    assert found.p_from == "exact"
    assert found.p == pytest.approx(np.mean(np.array(orders) >= whole - 1e-9), abs=1e-12)


def test_p_from_random_orders_agrees_with_students_where_both_serve():
    """At 29 donors both are good: their difference is that of 9999 draws, 4 standard errors."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=29)
    for strength in (0.0, 0.2, 0.4):
        found = cohort.donor_association(x, strength * x + rng.normal(size=29))
        student = float(cohort.p_value(found.rho, 29))
        assert found.p_from == "permutation"
        assert abs(found.p - student) < 4 * math.sqrt(student / 9999) + 0.003
    assert cohort.donor_association(np.arange(29.0), np.arange(29.0)).p == 1 / 10000  # never 0


@pytest.mark.smoke
def test_partial_spearman_is_the_inverse_of_the_rank_correlations():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2, 80))
    z[1] = rng.integers(0, 2, 80)
    x, y = z[0] + rng.normal(size=80), z[1] - z[0] + rng.normal(size=80)
    inverse = np.linalg.inv(stats.spearmanr(np.stack([x, y, *z]), axis=1).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert cohort.spearman(x, y, z) == pytest.approx(expected, abs=1e-10)
    doubled = np.stack([*z, 1 - z[1]])  # says nothing new
    assert cohort.spearman(x, y, doubled) == pytest.approx(expected, abs=1e-10)
    assert cohort.donor_association(x, y, doubled).covariates == 2
    found = cohort.donor_association(x, y, z)
    t = abs(expected) * math.sqrt(76 / (1 - expected**2))
    assert found.covariates == 2 and found.p == pytest.approx(2 * stats.t.sf(t, 76), abs=1e-10)
    assert cohort.donor_association(x, z[0] ** 3, z).left_out == "covariates explain all of it"
    few = cohort.donor_association(x[:12], y[:12], z[:, :12])
    assert few.p_from == "permutation" and 0 < few.p <= 1 and few.n == 12


def test_donors_with_missing_values_are_left_out_pair_by_pair():
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(size=(3, 60))
    y[3:9], z[20] = np.nan, np.nan
    keep = ~np.isnan(y + z)
    assert cohort.donor_association(x, y).n == 54
    found = cohort.donor_association(x, y, z[None])
    assert found.n == 53 and found.rho == cohort.spearman(x[keep], y[keep], z[None, keep])
    rows = np.stack([x, np.where(np.arange(60) == 40, np.nan, x), -x])     # one without donor 40
    whole = cohort.donor_association(x, y)
    rho, p = cohort.redrawn_donors(rows, y, (), whole)
    assert rho[0] == whole.rho == -rho[2] and p[0] == whole.p == pytest.approx(p[2])
    one = cohort.donor_association(rows[1], y)
    assert one.n == 53 and (rho[1], p[1]) == (one.rho, one.p)
    given = cohort.donor_association(rows[1], y, z[None])
    rho, p = cohort.redrawn_donors(rows, y, z[None], cohort.donor_association(x, y, z[None]))
    assert (rho[1], p[1]) == pytest.approx((given.rho, given.p), abs=1e-12)
    assert np.isnan(cohort.redrawn_donors(rows, y, (), cohort.donor_association(x, y * 0))).all()
    assert cohort.donor_association(x, np.full(60, 3.0)).left_out == "all 60 outcomes are 3"
    assert cohort.donor_association(np.zeros(60), y).left_out == "all 54 ratios are 0"
    assert cohort.donor_association(x[:5], y[:5]).left_out == "too few donors"


def test_difference_of_two_models():
    rng = np.random.default_rng(4)
    y = rng.normal(size=150)
    good, bad = y + rng.normal(size=150), y + 6 * rng.normal(size=150)
    n, change, low, high = cohort.donor_difference(bad, good, y)
    expected = stats.spearmanr(good, y).statistic - stats.spearmanr(bad, y).statistic
    assert change == pytest.approx(expected, abs=1e-12)
    assert 0 < low < change < high and n == 150
    back = cohort.donor_difference(good, bad, y)
    assert back[1:] == pytest.approx((-change, -high, -low), abs=1e-12)
    assert cohort.donor_difference(good, np.exp(good), y)[1:] == (0, 0, 0)  # ranks alone count
    y[7] = np.nan
    assert cohort.donor_difference(bad, good, y)[0] == 149
    unpaired = cohort.donor_difference(good, good + 1e-3 * rng.normal(size=150), y)
    assert unpaired[3] - unpaired[2] < 0.01  # resampled together: no noise of the donors


def test_otsu_is_the_best_of_all_splits():
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.normal(3, 1, 200), rng.normal(9, 2, 60)]).round(1)

    def between(cut):
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * (high.mean() - low.mean()) ** 2

    best = max(sorted(set(values))[:-1], key=between)
    cut = cohort.otsu_threshold(values)
    assert best < cut < values[values > best].min()
    assert cohort.otsu_threshold(np.array([1.0, 1, 1, 5])) == 3
    with pytest.raises(ValueError, match="3 values that are all equal"):
        cohort.otsu_threshold(np.array([2.0, 2, 2]))


def test_redrawn_tiles():
    """Each redraw is one of the choices of 4 from 5 tiles, all come about equally often."""
    cells, positive = np.array([[10, 20, 30, 40, 50, 7]]), np.array([[1, 5, 9, 20, 44, 7]])
    donor = np.array([0, 0, 0, 0, 0, 1])
    found = cohort.redrawn_ratios(np.repeat(positive, 2, 0), np.repeat(cells, 2, 0), donor, 0.8,
                                  5000, seed=1)
    assert found.shape == (2, 5000, 2) and np.array_equal(found[0], found[1])     # the same draw
    assert (found[..., 1] == 1).all()
    possible = sorted((79 - positive[0, i]) / (150 - cells[0, i]) for i in range(5))
    seen, times = np.unique(found[0, :, 0], return_counts=True)
    assert seen == pytest.approx(possible) and np.abs(times - 1000).max() < 5 * math.sqrt(800)
    two = cohort.redrawn_ratios(positive[:, :3], cells[:, :3], np.zeros(3, int), 0.9, 99)
    assert len(np.unique(two)) == 3                            # never all three tiles
    nothing = np.array([[0]])
    assert np.isnan(cohort.redrawn_ratios(nothing, nothing, nothing[0], 1, 3)).all()


def test_ratio_interval():
    """Bernoulli tiles of one cell: the percentile bootstrap of a mean, sqrt(p (1 - p) / n) wide."""
    positive, cells = np.repeat([1, 0], [60, 140]), np.ones(200, int)
    low, high = cohort.ratio_interval(positive, cells, 4000)
    error = math.sqrt(0.3 * 0.7 / 200)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.2 * error)
    assert np.isnan(cohort.ratio_interval(np.array([3]), np.array([9]))).all()


def test_it_is_fast():
    """Two outcomes, 2 models, 500 donors of 20 tiles, 1,000 redraws: under 5 s of a core."""
    rng = np.random.default_rng(6)
    donor, cells = np.repeat(np.arange(500), 20), rng.integers(20, 80, (2, 10000))
    positive, y = rng.binomial(cells, 0.3), rng.integers(0, 7, (2, 500)).astype(float)
    begin = time.process_time()
    ratios = cohort.redrawn_ratios(positive, cells, donor, 0.8, 1000)
    x = np.stack([np.bincount(donor, row) for row in positive]) / 1000
    found = np.array([[cohort.redrawn_donors(ratios[m], each, (),
                                             cohort.donor_association(x[m], each))
                       for each in y] for m in range(2)])
    cohort.false_discovery(found[:, :, 1].transpose(0, 2, 1))
    for each in y:
        cohort.donor_difference(x[0], x[1], each)
    seconds = time.process_time() - begin
    assert found.shape == (2, 2, 2, 1000) and seconds < 5, f"{seconds:.1f} s"


# ----------------------------------------------------------- simulated cohorts, fewer than in docs/


def test_intervals_hold_the_population_rho():
    """200 cohorts in place of 1,000: 95 % within four standard errors."""
    found = simulate_cohorts.coverage(200, seed=1, huge=100_000, rhos=(0.0, 0.7))
    for (rho, _), (truth, ours, _) in found.items():
        assert 0.9 < ours.value < 1 and abs(ours.value - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 200)
        # tile noise takes something away
        assert abs(truth) < 0.01 if rho == 0 else 0.6 < truth < rho
    plain, truth, held = simulate_cohorts.partial_coverage(200, seed=1, huge=100_000)
    assert truth < plain - 0.1 and abs(held.value - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 200)


def test_false_discoveries_stay_under_q():
    for associated in (0, 4):
        rate, error, found = simulate_cohorts.discoveries(200, seed=2, associated=associated)
        assert rate <= 0.05 + 2 * error
        assert found is None or found.value > 0.9


def test_more_tiles_more_power_and_better_intervals():
    found = simulate_cohorts.power(200, seed=3, tiles=(1, 5, 50))
    (weak, first), (_, second), (strong, third) = found.values()
    assert first.value < second.value < third.value and strong > weak + 0.05
    found = simulate_cohorts.ratio_coverage(100, seed=4, tiles=(5, 60))
    (few, wide), (many, narrow) = found.values()
    assert few.value < 0.9 < many.value and narrow < 0.4 * wide


# ------------------------------------------------------------------------------------------- peers

@pytest.mark.parametrize("covariates", [0, 2])
def test_against_pingouin(covariates):
    """Spearman's rho, plain and partial, and its p; Benjamini and Hochberg's q."""
    pingouin = pytest.importorskip("pingouin", reason="needs pingouin")
    import pandas
    rng = np.random.default_rng(covariates)
    z = rng.normal(size=(covariates, 60))
    x = rng.normal(size=60) + z.sum(0)
    y = (0.5 * x + z.sum(0) + rng.normal(size=60)).round(1)                  # with ties
    names = [f"z{i}" for i in range(covariates)]
    table = pandas.DataFrame(dict(x=x, y=y, **dict(zip(names, z))))
    if covariates:
        theirs = pingouin.partial_corr(table, "x", "y", names, method="spearman")
    else:
        theirs = pingouin.corr(x, y, method="spearman")
    rho = cohort.spearman(x, y, z)
    p = cohort.p_value(rho, 60, covariates)
    column = next(name for name in theirs.columns if name.lower() in ("p-val", "p_val", "pval"))
    assert rho == pytest.approx(float(theirs["r"].iloc[0]), abs=1e-9)
    assert p == pytest.approx(float(theirs[column].iloc[0]), rel=1e-6)
    some = rng.uniform(size=20) ** 2
    assert np.allclose(cohort.false_discovery(some), pingouin.multicomp(some, method="fdr_bh")[1])
