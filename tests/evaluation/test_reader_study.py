"""The reader study: the page hides what it must, a browser can read it to the end, and the scores are right."""

import base64
import csv
import itertools
import re
import struct
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, run_bundle
from monai.bundle import ConfigWorkflow
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import beta
from sklearn.metrics import cohen_kappa_score

from scripts.evaluation.cohorts import Cohort, Cohorts
from scripts.evaluation.reader_scores import fleiss_kappa, read_answers, score
from scripts.evaluation.reader_study import ReaderStudy, grey_png
from scripts.running.errors import BundleError
from scripts.running.pictures import triplanar

STUDY, SOURCES = "ab12", ["real", "ddpm", "real", "ddpm"]


def blobs(name, count, shape=(12, 14, 10), seed=0):
    rng = np.random.default_rng([seed, *name.encode()])
    volumes = np.stack([gaussian_filter(rng.uniform(-1, 1, shape), 1.5) for _ in range(count)])
    volumes = (volumes / abs(volumes).max()).astype(np.float16)
    files = [f"folder-of-{name}/secret-{name}-{i}.nii.gz" for i in range(count)]
    return Cohort(name, files, volumes, np.ones((count, len(shape)), np.float32))


def small_study(folder, num_images=3, seed=0, shape=(12, 14, 10)):
    cohorts = Cohorts(blobs("real", 5, shape), blobs("held-out", 2, shape), [blobs("ddpm", 4, shape)])
    study = ReaderStudy(cohorts, num_images, seed, str(folder))
    study.write()
    return study, cohorts


def rows_of(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def pictures_of(page):
    return [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([\w+/=]+)", page)]


def chunks_of(png):
    """{type: content} of the chunks of a PNG file."""
    place, chunks = 8, {}
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        chunks[png[place + 4 : place + 8]] = png[place + 8 : place + 8 + length]
        place += 12 + length
    return chunks


# ---------------------------------------------------------------------------------------------------- page and key


def test_the_page_and_the_key_hold_the_same_images_in_the_same_order(tmp_path):
    study, cohorts = small_study(tmp_path)
    key, pictures = rows_of(tmp_path / "key.csv"), pictures_of((tmp_path / "for_readers/reader_study.html").read_text())
    assert sorted(row["source"] for row in key) == ["ddpm"] * 3 + ["real"] * 3
    assert [row["image"] for row in key] == ["1", "2", "3", "4", "5", "6"]
    assert len({row["file"] for row in key}) == 6
    volumes = {f: v for cohort in (cohorts.real, *cohorts.synthetic) for f, v in zip(cohort.files, cohort.volumes)}
    assert pictures == [grey_png(triplanar(volumes[row["file"]])) for row in key]


def test_the_page_says_nothing_about_the_sources(tmp_path):
    small_study(tmp_path)
    page = (tmp_path / "for_readers/reader_study.html").read_text()
    text = re.sub(r"base64,[\w+/=]+", "", page)
    for secret in ("ddpm", "held-out", "secret", "folder-of", "nii", "key.csv", str(tmp_path)):
        assert secret not in text
    assert not re.search(r"https?://|src=\"(?!data:)|url\(", text)  # nor anything of the network
    chunks = [chunks_of(picture) for picture in pictures_of(page)]
    assert all(set(c) == {b"IHDR", b"IDAT", b"IEND"} for c in chunks)
    assert len({c[b"IHDR"] for c in chunks}) == 1  # size, depth and colour type


def test_grey_levels_have_one_window_for_all(tmp_path):
    from matplotlib import image

    (tmp_path / "x.png").write_bytes(grey_png(np.array([[-1.0, 0.0, 1.0], [-3.0, 0.5, 3.0]])))
    levels = image.imread(tmp_path / "x.png") * 255
    np.testing.assert_allclose(levels, [[0, 128, 255], [0, 191, 255]], atol=0.1)


def test_the_seed_decides_and_the_name_of_the_study_tells_studies_apart(tmp_path):
    keys = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_study(tmp_path / folder, seed=seed)
        keys.append(rows_of(tmp_path / folder / "key.csv"))
    assert keys[0] == keys[1] and keys[0][0]["study"] != keys[2][0]["study"]
    assert [row["file"] for row in keys[0]] != [row["file"] for row in keys[2]]


def test_the_order_is_shuffled_across_sources(tmp_path):
    orders = set()
    for seed in range(6):
        small_study(tmp_path / str(seed), seed=seed)
        orders.add(tuple(row["source"] for row in rows_of(tmp_path / str(seed) / "key.csv")))
    assert len(orders) > 3


def test_the_key_of_another_study_is_never_overwritten(tmp_path):
    small_study(tmp_path)
    before = (tmp_path / "key.csv").read_bytes()
    small_study(tmp_path)  # the same study: nothing is lost
    with pytest.raises(BundleError, match="could not be scored without it"):
        small_study(tmp_path, seed=1)
    assert (tmp_path / "key.csv").read_bytes() == before


def test_two_dimensional_images(tmp_path):
    small_study(tmp_path, shape=(12, 16))
    page = (tmp_path / "for_readers/reader_study.html").read_text()
    assert "sagittal" not in page and "--aspect: 0.75" in page
    assert struct.unpack(">II", chunks_of(pictures_of(page)[0])[b"IHDR"][:8]) == (12, 16)


@pytest.mark.parametrize(
    "knobs, sentence",
    [
        (
            {"num_images": 5},
            "num_images: 5 of each source were asked for, but ddpm has 4 in ''; expected fewer images or more volumes",
        ),
        ({"num_images": 0}, "num_images: 0 was given"),
        ({"num_images": 2.5}, "num_images: 2.5 was given"),
        ({"seed": -1}, "seed: -1 was given"),
    ],
)
def test_knobs_that_cannot_work(tmp_path, knobs, sentence):
    with pytest.raises(BundleError, match=sentence):
        small_study(tmp_path, **knobs)


# ---------------------------------------------------------------------------------------------------------- scores


def write_key(folder, sources=SOURCES):
    lines = [f"{STUDY},{i},{source},x{i}.nii" for i, source in enumerate(sources)]
    (folder / "key.csv").write_text("study,image,source,file\n" + "\n".join(lines) + "\n")
    return str(folder / "key.csv")


def write_answers(folder, reader, words, study=STUDY, name=None):
    """`words`: r or s for each image."""
    long = {"r": "real", "s": "synthetic"}
    lines = [f"{study},{reader},{i},{long.get(word, word)},{i + 1}.0" for i, word in enumerate(words)]
    path = folder / f"{name or reader}.csv"
    path.write_text("study,reader,image,answer,seconds\n" + "\n".join(lines) + "\n")
    return str(path)


def test_fleiss_kappa_of_the_worked_example():
    # 14 raters, 10 subjects, 5 categories: kappa = 0.210, P = 0.378
    counts = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
                7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    kappa, observed = fleiss_kappa(np.array(counts.split(), int).reshape(10, 5))
    assert kappa == pytest.approx(0.210, abs=5e-4) and observed == pytest.approx(0.378, abs=5e-4)


def test_fleiss_kappa_of_two_readers_is_scotts_pi():
    # Cohen's kappa of readers whose marginals are made equal, by counting each pair both ways round, is Scott's pi
    a, b = np.random.default_rng(0).integers(0, 2, (2, 40))
    counts = np.stack([2 - a - b, a + b], 1)
    assert fleiss_kappa(counts)[0] == pytest.approx(cohen_kappa_score(np.r_[a, b], np.r_[b, a]))


def test_fleiss_kappa_without_meaning_is_nan():
    assert np.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]]))).all()
    kappa, observed = fleiss_kappa(np.array([[3, 0], [3, 0]]))
    assert np.isnan(kappa) and observed == 1


def test_the_scores_of_three_readers(tmp_path, capsys):
    key = write_key(tmp_path, ["real", "ddpm", "real", "gan", "gan", "ddpm", "real"])
    #                              real ddpm real gan gan ddpm real
    files = [write_answers(tmp_path, reader, words) for reader, words in [("Ann", "rsrrsrs"), ("Bo", "rrrsssr")]]
    files.append(write_answers(tmp_path, "Özil | x", "sssssss"))
    rows = {(r["measure"], r["source"], r["reader"]): r for r in score(key, files, str(tmp_path / "out"))}
    called = {who: count for (what, who, reader), count in rows.items() if what == "called_real" and reader == "pooled"}
    assert {who: (row["count"], row["of"]) for who, row in called.items()} == {
        "real": (5, 9),
        "ddpm": (2, 6),
        "gan": (1, 6),
    }
    ann = rows["called_real", "ddpm", "Ann"]
    assert (ann["count"], ann["of"], ann["value"]) == (1, 2, 0.5)
    for row in rows.values():  # Clopper and Pearson's interval from its definition by the beta distribution
        if row["of"]:
            k, n = row["count"], row["of"]
            low, high = beta.ppf(0.025, k, n - k + 1) if k else 0, beta.ppf(0.975, k + 1, n - k) if k < n else 1
            assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert [rows["accuracy", "all", r]["count"] for r in ("Ann", "Bo", "Özil | x", "pooled")] == [4, 6, 4, 14]
    assert rows["median_seconds", "all", "Ann"]["value"] == 4
    pairs = list(itertools.combinations(["rsrrsrs", "rrrsssr", "sssssss"], 2))
    agreement = np.mean([[a == b for a, b in zip(*pair)] for pair in pairs])
    assert rows["observed_agreement", "all", "pooled"]["value"] == pytest.approx(agreement)
    text = (tmp_path / "out/scores.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert re.search(r"\| ddpm, called real +\| 1/2 = 50.0 % \[1.3, 98.7\]", text) and "Özil \\| x" in text
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("|")}) == 1
    saved = rows_of(tmp_path / "out/scores.csv")
    assert len(saved) == len(rows) and float(saved[0]["value"]) == pytest.approx(2 / 3)


def test_one_reader_has_no_agreement(tmp_path):
    score(write_key(tmp_path), write_answers(tmp_path, "Ann", "rsrs"), str(tmp_path))
    text = (tmp_path / "scores.md").read_text()
    assert "needs two readers" in text and "pooled" not in text and "1 reader\n" in text


def test_readers_who_never_differ_have_no_kappa(tmp_path):
    files = [write_answers(tmp_path, reader, "rrrr") for reader in ("Ann", "Bo")]
    score(write_key(tmp_path), files, str(tmp_path))
    text = (tmp_path / "scores.md").read_text()
    assert "kappa is not defined" in text and "agree on 100.0 %" in text


@pytest.mark.parametrize(
    "words, study, change, sentence",
    [
        ("rsrs", "cd34", None, "is of study cd34, but the key is of study ab12"),
        ("rsr", STUDY, None, "image '3' is missing"),
        ("rsrsr", STUDY, None, "image '4' does not belong to the study"),
        (["r", "s", "", ""], STUDY, None, r"image '2' \(and 1 more\) has no answer"),
        (["r", "s", "fake", "s"], STUDY, None, "image '2' has an answer that is none of"),
        ("rsrs", STUDY, (",3,", ",2,"), "image '2' is there twice"),
        ("rsrs", STUDY, ("Ann,3", "Bo,3"), r"names the readers \['Ann', 'Bo'\]"),
        ("rsrs", STUDY, ("Ann", "pooled"), r"names the readers \['pooled'\]"),
        ("rsrs", STUDY, ("1.0", "fast"), "seconds that are not a number"),
        ("rsrs", STUDY, (",synthetic,4.0", ""), "line 5 of .* is cut short"),
        ("rsrs", STUDY, ("answer", "verdict"), "has no column 'answer'"),
        ("", STUDY, None, "has no rows"),
    ],
)
def test_answers_that_cannot_be_scored(tmp_path, words, study, change, sentence):
    path = write_answers(tmp_path, "Ann", words, study)
    if change:
        text = (tmp_path / "Ann.csv").read_text()
        (tmp_path / "Ann.csv").write_text(text.replace(*change))
    with pytest.raises(BundleError, match=sentence):
        read_answers(path, STUDY, ["0", "1", "2", "3"])


def test_files_that_cannot_be_scored_together(tmp_path):
    key = write_key(tmp_path)
    files = [write_answers(tmp_path, "Ann", "rsrs", name=name) for name in ("first", "second")]
    with pytest.raises(BundleError, match="first.csv' and .*second.csv' are both of the reader 'Ann'"):
        score(key, files, str(tmp_path))
    with pytest.raises(BundleError, match="answers: None was given"):
        score(key, None, str(tmp_path))
    with pytest.raises(BundleError, match="key_file: .*absent.csv' cannot be read"):
        score(str(tmp_path / "absent.csv"), files[:1], str(tmp_path))
    with pytest.raises(BundleError, match="key_file: .*first.csv' has no column 'source'"):
        score(files[0], files[:1], str(tmp_path))
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(BundleError, match="answers: .*binary.csv' cannot be read"):
        score(key, [str(tmp_path / "binary.csv")], str(tmp_path))
    assert not (tmp_path / "scores.csv").exists()


class Reader:
    """A person before the page, who waits until an image can be answered (the page ignores double clicks)."""

    def __init__(self, browser):
        self.browser = browser

    def element(self, name):
        return self.browser.find_element("id", name)

    def open(self, page):
        """The page from its address."""
        self.browser.get("about:blank")
        self.browser.get(page)
        self.wait()

    def refresh(self):
        self.browser.refresh()
        self.wait()

    def wait(self):
        """Until the page has found what it kept."""
        self.until(lambda: any(self.element(part).is_displayed() for part in ("start", "reading", "done")))

    def enter(self, name):
        from selenium.webdriver.common.keys import Keys

        self.element("reader").send_keys(name + Keys.ENTER)
        self.until(lambda: self.element("reading").is_displayed() or self.element("done").is_displayed())

    def until(self, met):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20, 0.05).until(lambda browser: met())

    def press(self, key):
        time.sleep(0.3)
        self.browser.find_element("css selector", "body").send_keys(key)

    def click(self, name):
        time.sleep(0.3)
        self.element(name).click()

    @property
    def count(self):
        return self.element("count").text

    def pressed(self):
        return [word for word in ("real", "synthetic") if self.element(word).get_attribute("aria-pressed") == "true"]


def downloaded(folder):
    """The one file of the folder, once it is whole."""
    for _ in range(100):
        files = list(folder.glob("*.csv"))
        if files:
            return files[0]
        time.sleep(0.1)
    raise AssertionError(f"nothing was downloaded: {list(folder.glob('*'))}")


def test_a_reader_goes_through_the_page_to_the_end(tmp_path, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    small_study(tmp_path)
    key = rows_of(tmp_path / "key.csv")
    page = (tmp_path / "for_readers/reader_study.html").as_uri()
    reader = Reader(browser)
    reader.open(page)
    assert not reader.element("reading").is_displayed()
    reader.press("r")  # goes into the field of the name, and answers nothing
    reader.element("reader").clear()
    reader.enter('  Ann  "A", B ')
    assert reader.count == "image 1 of 6" and not reader.element("next").is_enabled()
    assert reader.element("name").text == 'Ann "A", B'
    assert browser.execute_script("const i = document.getElementById('picture'); return i.naturalWidth") == 14 + 12 + 12

    reader.press("r")
    time.sleep(0.3)
    ActionChains(browser).double_click(reader.element("synthetic")).perform()
    assert reader.count == "image 3 of 6"  # a double click is one answer
    reader.press(Keys.ARROW_RIGHT)
    assert reader.count == "image 3 of 6"  # not before it is answered
    reader.press(Keys.ARROW_LEFT)
    assert reader.count == "image 2 of 6" and reader.pressed() == ["synthetic"]
    reader.press("R")  # changed; capital letters count
    assert reader.count == "image 3 of 6" and reader.pressed() == []
    reader.press(Keys.CONTROL + "s")  # to save the page is no answer
    assert reader.count == "image 3 of 6"

    time.sleep(0.3)
    held = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 's', repeat: true, bubbles: true}))"
    browser.execute_script(held)
    assert reader.count == "image 3 of 6"  # nor is a key that is held down

    for again in [reader.refresh, lambda: reader.open(page)] * 5:  # what was answered is always there
        again()
        assert reader.count == "image 3 of 6" and reader.element("name").text == 'Ann "A", B'
    reader.press("s")
    reader.click("real")
    reader.click("back")
    assert reader.count == "image 4 of 6" and reader.pressed() == ["real"]
    reader.click("next")

    reader.click("other")  # a second reader at the same computer begins anew, the first one's answers stay
    reader.enter("Bo")
    assert reader.count == "image 1 of 6"
    reader.press("s")
    reader.click("other")
    reader.enter('Ann "A", B')
    assert reader.count == "image 5 of 6"

    reader.press("s")
    reader.press("s")
    assert reader.count == "6 of 6 answered" and not reader.element("reading").is_displayed()
    reader.click("review")
    assert reader.count == "image 6 of 6"
    reader.press(Keys.ARROW_RIGHT)
    reader.click("download")
    answers = rows_of(file := downloaded(tmp_path / "downloads"))
    assert file.name in reader.element("saved").text
    assert "".join(row["answer"][0] for row in answers) == "rrsrss"
    assert {row["reader"] for row in answers} == {'Ann "A", B'}
    assert all(0.2 < float(row["seconds"]) < 60 for row in answers)
    assert [row["image"] for row in answers] == [row["image"] for row in key]

    assert browser.get_log("browser") == []  # no error, no warning
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []

    scores = score(str(tmp_path / "key.csv"), [str(file)], str(tmp_path))
    right = sum((row["source"] == "real") == (word == "r") for row, word in zip(key, "rrsrss"))
    (accuracy,) = [r for r in scores if r["measure"] == "accuracy" and r["reader"] == 'Ann "A", B']
    assert (accuracy["count"], accuracy["of"]) == (right, 6)


def test_a_browser_that_keeps_nothing(tmp_path, browser):
    small_study(tmp_path)
    refuse = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('', 'SecurityError') }})"
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    reader = Reader(browser)
    reader.open((tmp_path / "for_readers/reader_study.html").as_uri())
    assert reader.element("no-storage").is_displayed()
    reader.enter("Cy")
    for _ in range(6):
        reader.press("r")
    assert reader.count == "6 of 6 answered" and browser.get_log("browser") == []


def test_a_browser_that_stops_keeping_says_so(tmp_path, browser):
    small_study(tmp_path)
    reader = Reader(browser)
    reader.open((tmp_path / "for_readers/reader_study.html").as_uri())
    reader.enter("Cy")
    reader.press("r")
    assert not reader.element("no-storage").is_displayed()
    browser.execute_script("IDBObjectStore.prototype.put = function () { this.transaction.abort() }")
    reader.press("s")
    reader.until(reader.element("no-storage").is_displayed)
    assert reader.count == "image 3 of 6"
    reader.press("r")
    assert reader.count == "image 4 of 6" and browser.get_log("browser") == []


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_study_as_a_command_and_its_scores(tmp_path):
    for name in ("mri", "gan"):
        (tmp_path / name).mkdir()
        for i, volume in enumerate(blobs(name, 3, (16, 16, 16)).volumes):
            image = nib.Nifti1Image((volume > 0) * (100 + 50 * volume.astype(np.float32)), np.eye(4))
            nib.save(image, tmp_path / name / f"{i}.nii.gz")
    out = tmp_path / "out"
    knobs = {
        "config_file": "configs/reader_study.json",
        "real_dir": tmp_path / "mri",
        "synthetic_dirs": {"gan": str(tmp_path / "gan")},
        "output_dir": out,
        "num_images": 2,
        "spatial_shape": "[16,16,16]",
        "num_workers": 0,
    }
    done = run_bundle("run", **knobs)
    assert done.returncode == 0, done.stderr
    key = rows_of(out / "key.csv")
    assert len(pictures_of((out / "for_readers/reader_study.html").read_text())) == len(key) == 4
    files = []
    for name in ("Ann", "Bo"):
        rows = [f"{row['study']},{name},{row['image']},real,1.5" for row in key]
        files.append(str(tmp_path / f"{name}.csv"))
        (tmp_path / f"{name}.csv").write_text("\n".join(["study,reader,image,answer,seconds", *rows]))
    places = {"key_file": str(out / "key.csv"), "answers": files, "output_dir": str(out)}
    config = str(ROOT / "configs/reader_study.json")
    ConfigWorkflow(config, logging_file=False, init_id="none", run_id="score", bundle_root=str(ROOT), **places).run()
    assert "4/4 = 100.0 %" in (out / "scores.md").read_text()


def test_the_command_refuses_plainly(tmp_path):
    knobs = {"config_file": "configs/reader_study.json", "real_dir": tmp_path, "synthetic_dirs": {"gan": str(tmp_path)}}
    refused = run_bundle("run", output_dir=tmp_path / "out", **knobs)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "error: num_images: 50 of each source were asked for, but real has 0 in" in refused.stderr


def test_a_study_of_pictures_as_a_command(tmp_path):
    """Folders of PNG with the 2D preset, the real ones by classes and with masks among them."""
    rng = np.random.default_rng(0)
    for name in ("mri/glioma/a", "mri/healthy/a", "mri/healthy/b", "gan/a", "gan/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 20), np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(rng.integers(0, 2, (24, 20), np.uint8) * 255).save(tmp_path / "mri/healthy/a_mask.png")
    config = "['configs/reader_study.json','configs/presets/mridiff.json']"
    folders = {"real_dir": tmp_path / "mri", "synthetic_dirs": {"gan": str(tmp_path / "gan")}}
    knobs = {"output_dir": tmp_path / "out", "num_images": 2, "spatial_shape": "[16,16]", "num_workers": 0}
    done = run_bundle("run", config_file=config, **folders, **knobs)
    assert done.returncode == 0, done.stderr
    key = rows_of(tmp_path / "out/key.csv")
    assert [row["source"] for row in sorted(key, key=lambda row: row["source"])] == ["gan"] * 2 + ["real"] * 2
    pictures = pictures_of((tmp_path / "out/for_readers/reader_study.html").read_text())
    assert len(pictures) == 4 and struct.unpack(">II", chunks_of(pictures[0])[b"IHDR"][:8]) == (16, 16)
    assert "mask (1)" in done.stdout and (tmp_path / "out/cache").is_dir()  # its own, which no other run touches
